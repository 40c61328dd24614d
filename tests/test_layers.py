"""Who may import whom (design, section 1): layers only point downwards, scripts import the package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Module -> modules of ours that it may import, all of which stand above it here: there is no cycle.
LAYERS = {
    "trajectory": set(),
    "grpo": set(),
    "model": set(),
    "sampling": set(),
    "config": set(),
    "metrics": set(),
    "optimizer": set(),
    "isolation": set(),
    "landlock": {"isolation"},
    "sandbox_child": {"isolation", "landlock"},
    "sandbox_warm": set(),
    "sandbox_server": {"isolation", "sandbox_child", "sandbox_warm"},  # the warm parent that forks: nothing else of ours gets into what it forks
    "cache": {"model"},  # for ModelConfig
    "attention": {"cache", "model"},  # of the latter, types
    "kernels": set(),
    "paged": {"model"},  # for ModelConfig
    "paged_attention": {"attention", "kernels", "model", "paged"},
    "decode_step": {"kernels", "model", "paged", "paged_attention", "sampling"},
    "threads": set(),
    "sandbox_http": {"threads", "trajectory"},
    "sandbox_log": {"trajectory"},
    "sandbox": {"sandbox_child", "sandbox_http", "sandbox_log", "trajectory"},  # for Limits and Execution
    "template": {"trajectory"},
    "replay": {"trajectory"},
    "answers": set(),
    "reward": {"answers", "trajectory"},
    "filters": {"reward", "trajectory"},  # which box counts is the reward's to say
    "rl_metrics": {"template", "trajectory"},
    "results": {"trajectory"},
    "curves": {"metrics", "results"},
    "compare": {"metrics", "results"},
    "data": {"template", "trajectory"},
    "benchmarks": {"data"},
    "code_channel": set(),  # sent to the sandbox as text: nothing of ours gets there
    "code_tests": {"sandbox", "trajectory"},
    "code_benchmarks": {"benchmarks", "code_channel", "code_tests", "data"},
    "batch": {"attention", "grpo", "model", "trajectory"},  # packs and scores
    "weights": {"model"},
    "plan": {"batch", "cache", "config", "model", "weights"},
    "plan_round": {"config", "model", "plan"},
    "checkpoint": {"weights"},
    "parallel": {"checkpoint", "model", "plan", "weights"},  # plan for its command line
    "engine": {"attention", "cache", "model", "sampling"},
    "paged_engine": {"attention", "decode_step", "engine", "model", "paged", "paged_attention", "sampling"},
    "clients": {"engine", "paged_engine", "sampling", "template", "threads", "weights"},
    "critic": {"clients", "sampling"},
    "gsm": {"critic"},
    "rollout": {"data", "engine", "reward", "sampling", "sandbox", "template", "trajectory"},
    "code_answers": {"code_benchmarks", "data", "rollout", "template", "trajectory"},
    "code_scores": {"code_answers", "code_benchmarks", "code_tests", "trajectory"},
    "toy": {"config", "critic"},  # for its scripted Critic
    "tirgen_filters": {"sampling", "template", "trajectory"},
    "tirgen_text": {"data", "reward", "rollout", "template", "tirgen_filters", "trajectory"},
    "tries": {"checkpoint", "data", "trajectory"},
    "funnel": {"data", "tirgen_filters", "trajectory", "tries"},
    "actor_critic": {"clients", "critic", "data", "reward", "rollout", "sampling", "sandbox", "template", "tirgen_text",
                     "trajectory", "tries"},
    "quirks": {"batch", "rollout", "sampling", "trajectory"},
    "rl_evaluation": {"checkpoint", "data", "filters", "reward", "rl_metrics", "rollout", "trajectory"},
    "audit_equations": {"trajectory"},
    "audit": {"audit_equations", "trajectory"},  # shares nothing with what it checks
    "dump": {"batch", "filters", "grpo", "metrics", "reward", "rollout", "trajectory"},
    "report": {"checkpoint", "data", "metrics", "template", "trajectory"},
}
MODULES = sorted(path.stem for path in (ROOT / "thor").glob("*.py") if path.stem != "__init__")
SCRIPTS = sorted(path for folder in (".", "runs", "benchmarks") for path in (ROOT / folder).glob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in the file; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """The modules of the package that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("thor.")}.intersection(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_layer_allows(module):
    assert module in LAYERS, f"thor/{module}.py has no place in the table"
    surplus = ours(ROOT / "thor" / f"{module}.py") - LAYERS[module]
    assert not surplus, f"thor/{module}.py imports {', '.join(sorted(surplus))}"


def test_layers_only_point_downwards():
    order = list(LAYERS)
    for module, below in LAYERS.items():
        assert below <= set(order[:order.index(module)])


@pytest.mark.parametrize("module", MODULES)
def test_the_package_never_imports_a_script_or_a_test(module):
    forbidden = {path.stem for path in SCRIPTS if path.parent == ROOT} | {"runs", "tests", "conftest"}
    assert not {name.split(".")[0] for name in imported(ROOT / "thor" / f"{module}.py")} & forbidden


def test_the_package_itself_is_empty():
    assert (ROOT / "thor" / "__init__.py").read_text() == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_importing_a_script_does_nothing(script):
    """Its top level holds names and, at the bottom, the guarded call of main."""
    *body, last = ast.parse(script.read_text()).body
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    for node in body[1:]:
        path_line = isinstance(node, ast.Expr) and ast.unparse(node).startswith("sys.path.insert")
        assert path_line or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef,
                                              ast.ClassDef, ast.Assign, ast.AnnAssign)), ast.unparse(node)

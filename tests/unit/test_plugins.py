"""Test registries: built-in entries, entries of other packages, and packages that fail."""

import subprocess
import sys
import textwrap

import pytest

from distillm_cli import plugins
from distillm_cli.plugins import PluginWarning, Registry
from tests.codes import raises_code


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that installs a package of one module with an entry point."""

    def install(module: str, code: str, group: str = "distillm.toys") -> None:
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        metadata = tmp_path / f"{module}_package-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-package\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{module} = {module}\n")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "toys", Registry("toys"), raising=False)
    return install


GOOD = """
    from distillm_cli import plugins
    plugins.toys.register("ball", 1)
"""


def test_entry_point_registers_entries_of_its_module(package):
    package("good", GOOD)
    assert dict(plugins.toys) == {"ball": 1}
    assert plugins.toys.failures == []


def test_package_that_cannot_be_imported_is_left_out(package):
    package("good", GOOD)
    package("bad", "from distillm_cli import plugins\nplugins.toys.register('doll', 2)\nimport no_such_module")
    with pytest.warns(PluginWarning, match=r"bad-package.*no_such_module"):
        assert dict(plugins.toys) == {"ball": 1}
    (failure,) = plugins.toys.failures
    assert (failure.group, failure.name, failure.distribution) == ("distillm.toys", "bad", "bad-package")


def test_failed_package_leaves_no_entries_in_other_groups(package):
    code = """
        import distillm_cli.config.methods
        from distillm_cli import plugins
        plugins.methods.register("mine", 1)
        import no_such_module
    """
    package("bad", code)
    with pytest.warns(PluginWarning, match="bad-package"):
        assert not plugins.toys
    assert "mine" not in plugins.methods
    assert "kd" in plugins.methods


def test_duplicate_name_is_rejected(package):
    plugins.toys.register("ball", 0, "this_program")
    package("good", GOOD)
    with pytest.warns(PluginWarning, match="ball.*this_program.*good"):
        assert dict(plugins.toys) == {"ball": 0}
    with raises_code("usage.invalid_plugin", "ball"):
        plugins.toys.register("ball", 3)


def test_entry_that_fails_its_check_is_left_out(package, monkeypatch):
    def check(entry):
        raise ValueError(f"{entry} is too small")

    monkeypatch.setattr(plugins, "toys", Registry("toys", check=check))
    package("good", GOOD)
    with pytest.warns(PluginWarning, match="ValueError: 1 is too small"):
        assert "ball" not in plugins.toys


def test_entry_registered_after_the_schema_is_rejected():
    from distillm_cli.config import schema  # noqa: F401

    with raises_code("usage.invalid_plugin", "late", "entry point"):
        plugins.divergences.register("late", None, "late_module")


def run(code: str, path) -> str:
    """Run a program that finds the packages under ``path``."""
    program = f"import sys; sys.path.insert(0, {str(path)!r})\n{textwrap.dedent(code)}"
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_divergence_with_a_reserved_parameter_is_left_out(package, tmp_path):
    code = """
        from distillm_cli.config.fields import DivergenceConfig
        from distillm_cli.losses.divergences import KL, register_divergence

        class Config(DivergenceConfig):
            kd_weight: float = 2.0

        register_divergence("clash", config=Config)(type("Clash", (KL,), {}))
    """
    package("clash", code, "distillm.divergences")
    out = run(
        """
        from distillm_cli.config.explain import choices
        print(choices("objective.divergence"))
        """,
        tmp_path,
    )
    assert "'clash'" not in out
    assert "'atkd'" in out
    assert "kd_weight" in out


def test_divergence_of_another_package_has_its_own_keys(package, tmp_path):
    code = """
        from typing import Annotated
        from pydantic import Field
        from dataclasses import dataclass
        from distillm_cli.config.fields import DivergenceConfig
        from distillm_cli.losses.divergences import KL, Divergence, register_divergence

        class Config(DivergenceConfig):
            scaled_by: Annotated[float, Field(gt=0)] = Field(2.0, description="factor of KL")

        @register_divergence("scaled", config=Config)
        @dataclass(frozen=True)
        class Scaled(Divergence):
            scaled_by: float

            def between(self, p, q, with_grad=True):
                value_N, h_NV = KL().between(p, q, with_grad)
                return value_N * self.scaled_by, h_NV * self.scaled_by if with_grad else None
    """
    package("scaled", code, "distillm.divergences")
    out = run(
        """
        import warnings
        from distillm_cli.config.load import resolve, to_yaml
        from distillm_cli.errors import RecipeError
        resolved = resolve(command="distill", sets=["objective.divergence=scaled", "objective.scaled_by=3"])
        print([line.split()[:2] for line in to_yaml(resolved).splitlines() if "scaled" in line or "alpha:" in line])
        for sets in (["objective.scaled_by=3"], ["objective.divergence=scaled", "objective.scaled_by=0"]):
            try:
                resolve(command="distill", sets=sets)
            except RecipeError as error:
                print(error.code, error)
        print("torch" in sys.modules)
        from distillm_cli.losses import objectives
        print(objectives.build(resolved.recipe.objective).divergence)
        """,
        tmp_path,
    )
    assert "['divergence:', 'scaled'], ['scaled_by:', '3.0']" in out
    assert "recipe.unused_field --set objective.scaled_by = 3" in out
    assert "recipe.invalid_value --set objective.scaled_by = 0" in out
    assert "\nFalse\nScaled(scaled_by=3.0)" in out


def test_schema_and_divergences_import_no_torch(tmp_path):
    code = """
        import distillm_cli.cli.app, distillm_cli.config.load
        from distillm_cli import plugins
        print(len(plugins.divergences), "torch" in sys.modules)
    """
    assert run(code, tmp_path).startswith("12 False")

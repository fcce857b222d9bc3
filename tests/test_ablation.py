"""benchmarks/ablation.py: its settings are configurations, and its report says what the runs wrote."""

import pytest
import yaml

from benchmarks import ablation, ablation_report
from common.config import load_config
from pretrain.config import RunConfig, check_run

TIMES = [0.15, 0.5, 0.9]


@pytest.mark.parametrize("name", ablation.SETTINGS)
def test_every_setting_is_a_configuration(tmp_path, name):
    path = tmp_path / "run.yaml"
    settings = {"annealing.steps": 5, **ablation.SETTINGS[name].overrides}
    path.write_text(yaml.safe_dump(ablation.nested(settings)))
    check_run(load_config(RunConfig, path))
    assert ablation.SETTINGS[name].rate_of in (None, *ablation.SETTINGS)


def metrics(ce: float) -> list[dict]:
    """Of a run of four steps, validated at its start and end."""
    held_out = {f"val_masked_ce_t{t:g}": ce + t for t in TIMES} | {"val_accuracy": 0.25}
    steps = [{"step": n, "tokens": 10 * n, "grad_norm": norm} for n, norm in enumerate([4.0, 9.0, None, 2.0], 1)]
    steps[-1] |= held_out
    return [{"step": 0, "tokens": 0, **held_out}, *steps]


def adapted(name: str, ce: float, seed: int = 1) -> ablation_report.Adapted:
    return ablation_report.Adapted.of(name, 1e-3, seed, metrics(ce), TIMES)


def test_what_a_run_has_come_to():
    run = adapted("none", 5.0)
    assert run.ce == {0.15: 5.15, 0.5: 5.5, 0.9: 5.9}
    assert run.curve == [(0, 5.5), (40, 5.5)]
    assert run.norms == (4.0, 9.0, 5.5)
    assert ablation_report.best_of([run, adapted("none", 4.0), adapted("none", 6.0)]).ce[0.5] == 4.5


def test_the_report_compares_with_none_of_the_same_seed(tmp_path):
    found = {
        "none": [adapted("none", 5.0), adapted("none", 6.0, 2)],
        "window": [adapted("window", 4.75), adapted("window", 6.5, 2)],
    }
    path = tmp_path / "ablation.md"
    text = ablation_report.write_report(found, "About.", "python benchmarks/ablation.py", path)
    assert path.read_text() == text
    assert path.with_suffix(".png").stat().st_size > 0
    [row] = [line for line in text.splitlines() if line.startswith("| window")]
    assert "| 5.775 ± 0.875 |" in row
    assert "| -0.250, +0.500 | -0.250, +0.500 |" in row


def test_settings_by_dotted_names():
    assert ablation.nested({"a.b": 1, "a.c.d": 2, "e": 3}) == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}

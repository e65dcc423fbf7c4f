"""A study's report says what its rows say."""

import numpy as np
import pytest

from evaluation import pictures, study


def row(method: str, seed: int | None, reward: float, kl: float | None = 1.0, **more) -> dict:
    interval = {"value": reward, "low": reward - 0.02, "high": reward + 0.02, "n": 64}
    measured = {"sampled/reward": interval, "sampled/length": {"value": 4.0}}
    if kl is not None:
        measured["sampled/kl"] = {"value": kl}
    facts = {"commit": "abc", "date": "2026-11-27", "versions": {"torch": "2.13"}}
    default = {"name": f"{method}-s{seed}", "method": method, "seed": seed, "default": True}
    return default | {"measured": measured} | facts | more


def swept(strength: float, reward: float, kl: float, default: bool = False) -> dict:
    return row("dpo", 0, reward, kl, default=default, knob="beta", strength=strength, seconds=71)


CURVE = [{"step": 50, "reward": 0.4, "kl": 0.5}, {"step": 100, "reward": 0.5, "kl": 1.0}]
ROWS = [
    row("kto", 9, float("nan")),
    row("kto", 10, 0.5, curve=CURVE),
    swept(0.1, 0.45, 4.0),
    swept(1.0, 0.4, 0.3),
    swept(0.3, 0.48, 1.2, default=True),
    row("dpo", 1, 0.46, strength=0.3),
    row("start", None, 0.319, 0.0),
    row("best-of-4", None, 0.437, None, best_of=4, measures=["kind"]),
]


def test_the_report(tmp_path):
    (tmp_path / "note.md").write_text("What a person says.\n")
    study.write(tmp_path, ROWS, "python compare.py --quick")
    text = (tmp_path / "README.md").read_text()
    lines = [[x.strip() for x in line.strip("|").split("|")] for line in text.splitlines()]
    table = [line for line in lines if len(line) > 1]
    assert table[0][:4] == [
        "method",
        "runs",
        "reward, sampled",
        "KL from the start, nats per answer",
    ]
    # Greedy answers were not measured, and no row has the value of the extra measure.
    assert table[0][4:] == ["tokens per answer", "seconds", "kind"]
    assert [line[:3] for line in table[2:]] == [
        ["start", "1", "0.319 (0.299 to 0.339)"],
        ["dpo", "2", "0.470 (0.460 to 0.480)"],
        ["dpo, beta=0.1", "1", "0.450 (0.430 to 0.470)"],
        ["dpo, beta=1", "1", "0.400 (0.380 to 0.420)"],
        ["kto", "2", "0.500 (0.500 to 0.500; 1 of 2 runs)"],  # a run diverged
        ["best-of-4", "1", "0.437 (0.417 to 0.457)"],
    ]
    assert [line[5] for line in table[2:5]] == ["-", "71 (71 to 71; 1 of 2 runs)", "71"]
    assert "`python compare.py --quick`; commit abc; date 2026-11-27" in text and "nan" not in text
    assert "What a person says." in text
    for name in ("frontier.png", "length.png", "curves.png"):
        assert f"]({name})" in text and (tmp_path / name).stat().st_size > 10_000


def test_rows_of_another_tool_come_last():
    assert [*study.groups([row("dpo-trl", 0, 0.5), *ROWS])][-2:] == ["best-of-4", "dpo-trl"]


def test_the_pictures_show_the_rows():
    dpo, kto = pictures.trade_off(ROWS, "sampled/kl").axes[:2]
    assert (dpo.get_title(), kto.get_title()) == ("dpo, by beta", "kto")
    lines = [line.get_xydata().tolist() for line in dpo.lines]
    best, others, start, runs, sweep, *bars = lines
    assert best == [[0, 0.319], [pytest.approx(np.log(4) - 3 / 4), 0.437]]
    assert bars[0] == [[4, pytest.approx(0.43)], [4, pytest.approx(0.47)]] and len(bars) == 3
    assert sorted(others) == [[1, 0.46], [1, 0.5], [1.2, 0.48]] and start == [[0, 0.319]]
    assert runs == [[1.2, 0.48], [1, 0.46]]  # by seed
    assert sweep == [[4, 0.45], [1.2, 0.48], [0.3, 0.4]]  # by strength
    assert [text.get_text() for text in dpo.texts] == ["0.1", "0.3", "1"]
    curve = pictures.curves(ROWS).axes[0].lines[-1]
    assert np.allclose(curve.get_xydata(), [[0.5, 0.4], [1, 0.5]])


@pytest.mark.parametrize("change", [{"measured": {}}, {"curve": None}, {"versions": {}}])
def test_rows_with_less(tmp_path, change):
    study.write(tmp_path, [ROWS[1] | change], "")
    assert "| kto | 1 |" in (tmp_path / "README.md").read_text()

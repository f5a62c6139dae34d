"""Tables, plots and defaults that are made of records."""

import json
import pathlib
import re
from xml.etree import ElementTree

import pytest

from bench import __main__ as cli
from bench.cases import CASES
from bench.common import records
from bench.measure.profile import Profile
from bench.report import html, plots, select, tables, write
from bench.report.figures import pictures
from bench.static import traffic as traffic_module
from bench.static.traffic import TrafficRecord
from mvsplit_ops import _backends
from tests.bench.sample_records import (
    CPU,
    GPU,
    column,
    everything,
    in_loop,
    old_step,
    ops,
    profile,
    run,
    step,
    traffic,
)

ROOT = pathlib.Path(__file__).parent.parent.parent


def folder(path, *made):
    for record in made:
        records.append(record, path / "runs.jsonl")
    return path


def found(*made):
    return [select.SourcedRecord("runs.jsonl", {"kind": "profile", **record}) for record in made]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder with records of every kind, and its reports."""
    path = folder(tmp_path_factory.mktemp("records"), *everything())
    write.write(path, path)
    return path


def test_the_markdown_has_the_tables_of_every_kind(full):
    text = (full / "report.md").read_text()
    for title, _ in tables.KINDS.values():
        assert f"## {title}\n" in text
    assert "no record yet" not in text
    assert "| (RoPE (q, k)) | 700 / 400 | 5.000 / 2.000 / 1.000 |" in text
    assert "| B 16, T 256+64 | cuda | 144.0 | 259.2 | 403.2 | 20.0 | 1 / 2 |" in text
    assert (
        "| mvsplit | cpu | none | 1.0 | 600.0 | 50.0 | 650.0 | 5,000 | 2.000 | 50% | 3.00 |" in text
    )
    assert "| swiglu fwd | triton | _fwd | 90 |" in text and "| A CPU | 20.0 | 4.000 |" in text
    assert "1697.4 ms eager, 614.0 ms with its kernels" in text
    machines = text.split("## Machines")[1].split("##")[0]
    assert "| A GPU &lt;80 GB> | 9.0 | – | 570.1 | 2.13.0 | 3.9.0 | 3.11.7 |" in machines


def test_every_table_names_its_source(full):
    text = (full / "report.md").read_text()
    for table in text.split("\n### ")[1:]:
        sources = [line for line in table.splitlines() if line.startswith("- Source: ")]
        assert sources and all("runs.jsonl, 2026-01-" in line for line in sources), table
        assert all("commit abcdef123456" in line and "torch 2.13.0" in line for line in sources)
    assert "A GPU &lt;80 GB>, driver 570.1, torch 2.13.0, triton 3.9.0" in text


def test_a_peer_that_fails_has_its_reason_and_no_number(full):
    text, html = ((full / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "| B 4, T 256+64 | liger | failed | – | – | – | – | – | – | – |" in text
    assert "- liger: failed: result 0 \\| is &lt;wrong>" in text
    assert "- quack: quack-kernels is not installed; pip install it" in text
    assert "liger: failed: result 0 | is &lt;wrong&gt;" in html


def test_reasons_say_where_when_they_do_not_hold_everywhere():
    one, two = ops(CASES[3], batch=1), ops(CASES[3], liger=column(1e-5, 1e-5), batch=4)
    assert "liger: failed: result 0 | is <wrong> (B 1, T 256+64)" in select.failures(
        found(one, two)
    )
    three = ops(CASES[0], batch=4)
    lines = select.failures(found(one, two, three))
    assert any(
        line.endswith("(SwiGLU at B 1, T 256+64, RoPE (q, k) at B 4, T 256+64)") for line in lines
    )


def test_the_page_needs_no_other_file_and_no_script(full):
    html = (full / "report.html").read_text()
    assert len(html) < 1e6
    outside = set(re.findall(r"https?://[^\s\"<]*", html))
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"} & outside
    assert "<script" not in html and "@import" not in html and "src=" not in html
    assert set(re.findall(r"<link [^>]*>", html)) == {'<link rel="icon" href="data:,">'}
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", html)
    assert used and {a or b for a, b in used} <= set(ids)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_the_page_is_well_formed_and_escaped(full):
    html = (full / "report.html").read_text()
    body = re.sub(r"<(meta|link)[^>]*>", "", html.removeprefix("<!doctype html>\n"))
    tree = ElementTree.fromstring(body)  # every tag closed, every < and & of a record escaped
    figures = list(tree.iter("figure"))
    assert len(figures) == html.count("<svg") == 14
    for figure in figures:
        caption = "".join(figure.find("figcaption").itertext())
        assert "runs.jsonl, 2026-01-" in caption or "not this machine" in caption
    titles = [figure.find("h3").text for figure in figures]
    assert "Speed-up over eager PyTorch, A GPU <80 GB>" in titles
    assert titles.count("The paper, 8 H100, its batch") == 1  # beside the GPU's, not the CPU's


def test_the_headlines_are_those_of_the_profile(full):
    html = (full / "report.html").read_text()
    card = html.split('<div class="card">')[1]
    unit = 700 + 400 * 1.5  # of the fused operators; eager code takes 5 forward and 7 backward
    assert f"<b>{(700 * 5 + 400 * 7) / unit:.2f}x</b>speed-up over eager PyTorch" in card
    assert f"<b>{(700 * 2 + 400 * 3) / unit:.2f}x</b>speed-up over torch.compile" in card
    rows = [row for row in profile()["rows"] if not row["part_of"]]
    calls = [(row, row["forward_calls"], row["backward_calls"]) for row in rows]
    moved = sum(f * row["bytes"][0] + b * row["bytes"][1] for row, f, b in calls)
    seconds = [(row["seconds"]["fused"], f, b) for row, f, b in calls]
    copied = moved / sum(f * s[0] + b * s[1] for s, f, b in seconds) / 2e10
    assert f"<b>{100 * copied:.0f}%</b>of the copy bandwidth" in card


def test_a_device_without_a_profile_has_its_headline_from_its_operators():
    sweep = [ops(case, batch=batch) for case in CASES for batch in (1, 4)]
    (headline,) = select.headlines(found(*sweep))
    assert headline.backend == "cuda"
    assert headline.eager == pytest.approx((700 * 8 + 400 * 20) / (700 + 400 * 1.8))
    assert {f.run["shape"]["B"] for f in headline.found} == {4}
    assert not select.headlines(found(ops(CASES[3])))  # one operator is not a step


def test_the_same_records_give_the_same_bytes(full, tmp_path):
    write.write(full, tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (full / name).read_bytes()


def test_kinds_without_a_record_are_one_line_with_the_command_that_makes_them():
    few = found(ops(batch=4), {"kind": "dream", "run": run()})
    page, text = html.html(few), write.text(few)
    for kind, (title, command) in tables.KINDS.items():
        line = f"{title}: no record yet; python -m bench {command} makes one."
        assert (line in text) == (line in page) == (kind != "ops")
        assert cli.parser().parse_args(command.split())
    assert "Records of kind dream are not shown." in text
    assert [p.title.split(",")[0] for p in pictures(few)] == ["Beside peers"]


def test_the_newest_of_each_is_shown_and_old_steps_are_not():
    old, new = profile(), profile(fused=2e-3)
    other = profile(GPU, "triton")
    assert [
        f.record["rows"][0]["seconds"]["fused"][0]
        for f in select.newest(found(old, new, other), "profile")
    ] == [
        2e-3,
        1e-3,
    ]
    assert select.newest(found(old_step()), "step") == []
    assert select.newest(found(step(), old_step()), "step")[0].record["rows"][0]["implementation"]
    sizes = select.newest(found(ops(batch=16), ops(batch=1), ops(batch=4), ops(batch=1)), "ops")
    assert [f.run["shape"]["B"] for f in sizes] == [1, 4, 16]


def test_bars_have_the_numbers_of_the_records():
    first = pictures(found(ops(CASES[3])))[0]
    text = plots.svg(first.figure, "p")
    for forward, backward in ((2, 3), (1.1, 2), (1, 1.8)):
        speed = (700 * 8 + 400 * 20) / (700 * forward + 400 * backward)
        assert f">{speed:.1f}</text>" in text
    assert ">mvsplit_ops, cuda</text>" in text and "Liger" not in text
    assert ">times faster than eager PyTorch</text>" in text and ">eager = 1</text>" in text


def test_eager_rope_and_qk_norm_are_drawn_beside_the_operator_they_make():
    record = in_loop()
    parts = [{**record["rows"][0], "op": op, "title": op} for op in ("rope", "qk_norm")]
    record["rows"] = parts + record["rows"][1:]
    (picture,) = pictures(found(record))
    assert ">150.0</text>" in plots.svg(picture.figure, "p")


def test_traffic_that_was_not_counted_is_a_dash_and_has_no_total():
    columns, rows, total = traffic_module.traffic_cells(TrafficRecord.from_json(traffic()))
    assert columns[2:] == ("reference", "triton", "published")
    cells = {row[0]: row for row in rows}
    assert cells["RoPE + QK-Norm, fwd"][4] == "–" and cells["SwiGLU, fwd"][4] == "13.60 (2)"
    assert total[4] == "–" and total[1] == "25,700" and int(total[3].replace(",", "")) > 25700


def test_fastest_is_the_least_step_time_at_the_largest_shape():
    small = ops(CASES[3], batch=1, triton=column(1e-9, 1e-9))
    large = ops(CASES[3], batch=16)
    assert select.fastest(found(small, large)) == {((9, 0), "swiglu"): ("cuda", "runs.jsonl")}
    # 700 forward and 400 backward calls: a slower backward is made up for.
    weighted = {"triton": column(1.0e-5, 2.1e-5), "cuda": column(1.2e-5, 1.8e-5)}
    weighted = select.fastest(found(ops(CASES[3], **weighted)))
    assert weighted == {((9, 0), "swiglu"): ("triton", "runs.jsonl")}
    wrong = ops(CASES[3], cuda={"failed": "wrong"})
    assert select.fastest(found(wrong)) == {((9, 0), "swiglu"): ("triton", "runs.jsonl")}
    wrong["failed"]["cuda"] = wrong["columns"].pop("cuda")["failed"]
    assert select.fastest(found(wrong)) == {((9, 0), "swiglu"): ("triton", "runs.jsonl")}


def test_one_backend_alone_or_a_cpu_is_not_the_fastest():
    alone = ops(CASES[3])
    del alone["columns"]["cuda"]
    carried = ops(CASES[5])
    assert carried["op"] not in _backends.OPS
    assert select.fastest(found(alone, carried, ops(CASES[3], CPU))) == {}


def test_committed_records_and_the_default_backends_agree():
    assert select.disagreements(select.read(records.RESULTS), committed=True) == []


def test_a_disagreement_of_records_and_defaults_is_told(full, tmp_path, capsys):
    assert cli.main(["report", str(full), "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert f"wrote {tmp_path / 'report.html'}" in told
    line = "FASTEST[((9, 0), 'swiglu')] is ('triton', None); the records say ('cuda', 'runs.jsonl')"
    assert line in told and "README" not in told


def test_a_default_without_a_committed_record_is_told(monkeypatch):
    monkeypatch.setitem(_backends.FASTEST, ((9, 0), "rope"), ("cuda", "x.jsonl"))
    (line,) = select.disagreements(found(profile()), committed=True)
    assert "is ('cuda', 'x.jsonl'); the records say ('triton', None)" in line


def test_readme_figures_are_those_of_the_records():
    """python -m bench report writes them; nobody types them."""
    text = (ROOT / "README.md").read_text()
    sections = write.readme_sections()
    assert set(sections) == {"report", "traffic", "predict"}
    for name, section in sections.items():
        begin, end = (mark.format(name) for mark in write.MARKS)
        assert text.split(begin)[1].split(end)[0].strip() == section


def test_committed_reports_are_those_of_the_records(tmp_path, monkeypatch):
    """make report writes them and the README's sections; plots depend on matplotlib's version."""
    readme, picture = tmp_path / "README.md", tmp_path / "bench/results/profile.svg"
    picture.parent.mkdir(parents=True)
    readme.write_text(re.sub(r"\d+x \|", "0x |", write.README.read_text()))
    before = write.README.read_text()
    monkeypatch.setattr(write, "README", readme)
    monkeypatch.setattr(write, "PICTURE", picture)
    write.write(records.RESULTS, tmp_path)
    assert readme.read_text() == before and picture.read_text().count("<svg") == 1
    for name in ("report.md", "report.html"):
        committed, made = (
            re.sub(r"<svg.*?</svg>", "", (path / name).read_text(), flags=re.S)
            for path in (records.RESULTS, tmp_path)
        )
        assert made == committed, f"{name}: run make report"


def test_the_picture_is_drawn(tmp_path):
    made = Profile.from_json(profile())
    for name in ("p.svg", "q.svg"):
        assert plots.draw([made, made], tmp_path / name) is None
    text = (tmp_path / "p.svg").read_text()
    assert text.count("<svg") == 1 and (tmp_path / "q.svg").read_text() == text


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("none", None, "no folder {}/none; there are: records"),
        ("records", [], "no records in {}/records, which holds notes.txt; python -m bench"),
        ("records", ["{"], "runs.jsonl, line 1: not a record of python -m bench"),
        ("records", [{"kind": "ops", "run": run()}], "lacks op, title, must_move"),
        ("records", [{**ops(), "op": "gelu"}], "is of 'gelu'; bench/cases.py has rope, "),
    ],
    ids=["no folder", "no record", "broken line", "incomplete", "operator"],
)
def test_what_cannot_be_read_is_one_line_and_exit_code_2(name, lines, message, tmp_path, capsys):
    path = tmp_path / "records"
    path.mkdir()
    (path / "notes.txt").touch()
    for line in lines or ():
        with open(path / "runs.jsonl", "a") as file:
            file.write(line if isinstance(line, str) else json.dumps(line))
    assert cli.main(["report", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("python -m bench report: ") and message.format(tmp_path) in error
    assert "\n" not in error and not (path / "report.md").exists()


def test_a_missing_place_for_the_report_is_told(full, tmp_path, capsys):
    assert cli.main(["report", str(full), "--out", str(tmp_path / "no")]) == 2
    assert f"--out: no folder {tmp_path / 'no'}; make it first" in capsys.readouterr().err

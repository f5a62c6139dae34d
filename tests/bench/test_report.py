"""Tables, figures, headlines and default backends that bench.report makes of records."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from bench import __main__ as cli
from bench.cases import CASES
from bench.common import records
from bench.common.records import ROOT
from bench.report import figures, plots, render, select, tables, write
from mvsplit_ops import _backends
from tests.bench.sample_records import (
    CPU,
    GPU,
    column,
    every_kind,
    in_loop,
    old_step,
    ops,
    profile,
    run,
    step,
    traffic,
)


def fill_folder(path, jsons):
    for json_record in jsons:
        records.append(json_record, path / "runs.jsonl")
    return path


def as_records(*jsons):
    """Return the records of these JSON objects, as read from a file."""
    return [select.parse_record("runs.jsonl", {"kind": "profile", **record}) for record in jsons]


def svg_of(figure):
    return plots.to_svg(figure.drawing, "p")


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder with records of every kind, and its reports."""
    path = fill_folder(tmp_path_factory.mktemp("records"), every_kind())
    write.write(path, path)
    return path


@pytest.fixture(scope="module")
def markdown(full):
    return (full / "report.md").read_text()


@pytest.fixture(scope="module")
def html(full):
    return (full / "report.html").read_text()


def test_the_markdown_has_the_tables_of_every_kind(markdown):
    for title, _ in render.KINDS.values():
        assert f"## {title}\n" in markdown
    assert "no record yet" not in markdown
    for row in (
        "| (RoPE (q, k)) | 700 / 400 | 5.000 / 2.000 / 1.000 |",
        "| B 16, T 256+64 | cuda | 144.0 | 259.2 | 403.2 | 20.0 | 1 / 2 |",
        "| mvsplit | cpu | none | 1.0 | 600.0 | 50.0 | 650.0 | 5,000 | 2.000 | 50% | 3.00 |",
        "| swiglu fwd | triton | _fwd | 90 |",
        "| A CPU | 20.0 | 4.000 |",
        "1697.4 ms eager, 614.0 ms with its kernels",
    ):
        assert row in markdown
    machines = markdown.split("## Machines")[1].split("##")[0]
    assert "| A GPU &lt;80 GB> | 9.0 | – | 570.1 | 2.13.0 | 3.9.0 | 3.11.7 |" in machines


def test_every_kind_of_record_has_a_class_and_a_section():
    assert all(kind == record.kind for kind, (record, _) in select.RECORD_CLASSES.items())
    assert set(render.KINDS) == {*select.RECORD_CLASSES, "predict"}


def test_every_table_names_its_source(markdown):
    for table in re.split(r"\n### |\n## (?=Machines)", markdown)[1:]:
        sources = [line for line in table.splitlines() if line.startswith("- Source: ")]
        assert sources and all("runs.jsonl, 2026-01-" in line for line in sources), table
        assert all("commit abcdef123456" in line and "torch 2.13.0" in line for line in sources)
    assert "A GPU &lt;80 GB>, driver 570.1, torch 2.13.0, triton 3.9.0" in markdown


def test_a_failed_peer_has_its_reason_and_no_number(markdown, html):
    assert "| B 4, T 256+64 | liger | failed | – | – | – | – | – | – | – |" in markdown
    assert "- liger: failed: result 0 \\| is &lt;wrong>" in markdown
    assert "- quack: quack-kernels is not installed; pip install it" in markdown
    assert "liger: failed: result 0 | is &lt;wrong&gt;" in html


def test_reasons_that_hold_for_some_points_only_name_them():
    wrong, right = ops(CASES[3], batch=1), ops(CASES[3], liger=column(1e-5, 1e-5), batch=4)
    lines = select.list_failures(as_records(wrong, right))
    assert "liger: failed: result 0 | is <wrong> (B 1, T 256+64)" in lines
    lines = select.list_failures(as_records(wrong, right, ops(CASES[0], batch=4)))
    names = "(SwiGLU at B 1, T 256+64, RoPE (q, k) at B 4, T 256+64)"
    assert any(line.endswith(names) for line in lines)


def test_the_page_needs_no_other_file_and_no_script(html):
    assert len(html) < 1e6
    outside = set(re.findall(r"https?://[^\s\"<]*", html))
    assert outside == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"} & outside
    assert "<script" not in html and "@import" not in html and "src=" not in html
    assert set(re.findall(r"<link [^>]*>", html)) == {'<link rel="icon" href="data:,">'}
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", html)
    assert references and {a or b for a, b in references} <= set(ids)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_the_page_is_well_formed_and_escaped(html):
    body = re.sub(r"<(meta|link)[^>]*>", "", html[html.index("<html") :])
    tree = ElementTree.fromstring(body)  # every tag closed, every < and & of a record escaped
    elements = list(tree.iter("figure"))
    assert len(elements) == html.count("<svg") == 14
    for element in elements:
        caption = "".join(element.find("figcaption").itertext())
        assert "runs.jsonl, 2026-01-" in caption or "not this machine" in caption
    titles = [element.find("h3").text for element in elements]
    assert "Speed-up over eager PyTorch, with peers, A GPU <80 GB>" in titles
    assert titles.count("The paper, 8 H100, its batch") == 1  # for the GPU, not for the CPU
    assert len(list(tree.iter("details"))) == 1 + len(render.KINDS)


def test_the_headlines_are_those_of_the_profile(html):
    card = html.split('<div class="card">')[1]
    unit = 700 + 400 * 1.5  # of the fused operators; eager code takes 5 forward and 7 backward
    assert f"<b>{(700 * 5 + 400 * 7) / unit:.2f}x</b>speed-up over eager PyTorch" in card
    assert f"<b>{(700 * 2 + 400 * 3) / unit:.2f}x</b>speed-up over torch.compile" in card
    rows = [row for row in profile()["rows"] if not row["part_of"]]
    calls = [(row, row["forward_calls"], row["backward_calls"]) for row in rows]
    moved = sum(f * row["bytes"][0] + b * row["bytes"][1] for row, f, b in calls)
    seconds = [(row["seconds"]["fused"], f, b) for row, f, b in calls]
    share = moved / sum(f * s[0] + b * s[1] for s, f, b in seconds) / 2e10
    assert f"<b>{100 * share:.0f}%</b>of the copy bandwidth" in card


def test_a_device_without_a_profile_has_the_headline_of_its_sweep():
    sweep = [ops(case, batch=batch) for case in CASES for batch in (1, 4)]
    (headline,) = select.make_headlines(as_records(*sweep))
    assert headline.backend == "cuda"
    assert headline.speed_ups["eager PyTorch"] == pytest.approx(
        (700 * 8 + 400 * 20) / (700 + 400 * 1.8)
    )
    assert {record.run["shape"]["B"] for record in headline.records} == {4}
    assert not select.make_headlines(as_records(ops(CASES[3])))  # one operator is not a step


def test_equal_records_give_equal_bytes(full, tmp_path):
    write.write(full, tmp_path)
    for name in ("report.md", "report.html"):
        assert (tmp_path / name).read_bytes() == (full / name).read_bytes()


def test_kinds_without_a_record_are_one_line_with_the_command_that_makes_one():
    report = render.build_report(as_records(ops(batch=4), {"kind": "dream", "run": run()}))
    page, text = render.to_html(report), render.to_markdown(report)
    for name, (title, command) in render.KINDS.items():
        line = f"{title}: no record yet; python -m bench {command} makes one."
        assert (line in text) == (line in page) == (name != "ops")
        assert cli.make_parser().parse_args(command.split())
    assert "Records of kind dream are not shown." in text
    titles = [figure.title for figure in report.figures]
    assert titles == ["Speed-up over eager PyTorch, with peers, A GPU <80 GB>"]


def test_the_newest_record_of_each_measurement_is_shown():
    profiles = as_records(profile(), profile(fused=2e-3), profile(GPU, "triton"))
    times = [r.data.rows[0].seconds["fused"][0] for r in select.newest(profiles, "profile")]
    assert times == [2e-3, 1e-3]
    points = as_records(ops(batch=16), ops(batch=1), ops(batch=4), ops(batch=1))
    assert [r.run["shape"]["B"] for r in select.newest_points(points)] == [1, 4, 16]


def test_old_records_of_steps_are_read_and_not_shown(tmp_path):
    steps = select.newest(select.read_records(fill_folder(tmp_path, [step(), old_step()])), "step")
    assert [row.implementation for row in steps[0].data.rows] == ["eager", "eager", "cpu", "cpu"]
    assert len(steps) == 1


def test_bars_have_the_numbers_of_the_records():
    (figure,) = figures.sweep_figures(as_records(ops(CASES[3])))
    text = svg_of(figure)
    for forward, backward in ((2, 3), (1.1, 2), (1, 1.8)):
        speed = (700 * 8 + 400 * 20) / (700 * forward + 400 * backward)
        assert f">{speed:.1f}</text>" in text
    assert ">mvsplit_ops, cuda</text>" in text and "Liger" not in text
    assert ">times faster than eager PyTorch</text>" in text and ">eager = 1</text>" in text


def test_eager_rope_and_qk_norm_count_as_the_operator_that_replaces_them():
    record = in_loop()
    parts = [{**record["rows"][0], "op": op, "title": op} for op in ("rope", "qk_norm")]
    record["rows"] = parts + record["rows"][1:]
    (parsed,) = as_records(record)
    assert ">150.0</text>" in svg_of(figures.in_loop_figure(parsed))


def test_an_uncounted_operator_is_a_dash_and_has_no_total():
    table = tables.record_table(*as_records(traffic()))
    assert table.columns[2:] == ("reference", "triton", "published")
    cells = {row[0]: row for row in table.rows}
    assert cells["RoPE + QK-Norm, fwd"][4] == "–" and cells["SwiGLU, fwd"][4] == "13.60 (2)"
    assert table.total[4] == "–" and table.total[1] == "25,700"
    assert int(table.total[3].replace(",", "")) > 25700


def test_the_fastest_backend_has_the_least_step_time_at_the_largest_shape():
    small = ops(CASES[3], batch=1, triton=column(1e-9, 1e-9))
    cuda = {((9, 0), "swiglu"): ("cuda", "runs.jsonl")}
    triton = {((9, 0), "swiglu"): ("triton", "runs.jsonl")}
    assert select.fastest(as_records(small, ops(CASES[3], batch=16))) == cuda
    # 700 forward and 400 backward calls: the faster forward outweighs the slower backward.
    times = {"triton": column(1.0e-5, 2.1e-5), "cuda": column(1.2e-5, 1.8e-5)}
    assert select.fastest(as_records(ops(CASES[3], **times))) == triton
    wrong = ops(CASES[3])
    del wrong["columns"]["cuda"]
    wrong["failed"]["cuda"] = "wrong"
    assert select.fastest(as_records(wrong)) == triton


def test_a_single_backend_and_a_cpu_do_not_decide_the_fastest():
    single = ops(CASES[3])
    del single["columns"]["cuda"]
    carried = ops(CASES[5])
    assert carried["op"] not in _backends.OPS
    assert select.fastest(as_records(single, carried, ops(CASES[3], CPU))) == {}


def test_committed_records_and_the_default_backends_agree():
    assert select.disagreements(select.read_records(records.RESULTS), committed=True) == []


def test_a_default_that_differs_from_the_records_is_printed(full, tmp_path, capsys):
    assert cli.main(["report", str(full), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {tmp_path / 'report.html'}" in printed
    line = "FASTEST[((9, 0), 'swiglu')] is ('triton', None); the records say ('cuda', 'runs.jsonl')"
    assert line in printed and "README" not in printed


def test_a_default_without_a_committed_record_is_a_disagreement(monkeypatch):
    monkeypatch.setitem(_backends.FASTEST, ((9, 0), "rope"), ("cuda", "x.jsonl"))
    (line,) = select.disagreements(as_records(profile()), committed=True)
    assert "is ('cuda', 'x.jsonl'); the records say ('triton', None)" in line


def test_committed_reports_are_those_of_the_records(tmp_path):
    """make report writes them and sections of READMEs; plots depend on matplotlib's version."""
    (tmp_path / "bench/results").mkdir(parents=True)
    pages = set(write.PAGES.values())
    for page in pages:
        text = (ROOT / page).read_text()
        (tmp_path / page).write_text(re.sub(r"\d+ \|", "0 |", text))
    write.write(records.RESULTS, tmp_path, root=tmp_path)
    assert (tmp_path / write.PICTURE).read_text().count("<svg") == 1
    for name in pages:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), (
            f"{name}: run make report"
        )
    for name in ("report.md", "report.html"):
        committed, written = (
            re.sub(r"<svg.*?</svg>", "", (path / name).read_text(), flags=re.S)
            for path in (records.RESULTS, tmp_path)
        )
        assert written == committed, f"{name}: run make report"


def test_the_section_of_the_readme_is_short():
    section = write.readme_sections(select.read_records(records.RESULTS))["report"]
    assert len(section.splitlines()) <= 20


def test_the_picture_of_the_readme_has_a_panel_for_each_device(tmp_path):
    profiles = [record.data for record in as_records(profile(), profile(GPU, "triton"))]
    for name in ("p.svg", "q.svg"):
        plots.save_svg(figures.draw_profiles(profiles), tmp_path / name)
    text = (tmp_path / "p.svg").read_text()
    assert text.count("<svg") == 1 and len(re.findall('id="axes_', text)) == 2
    assert (tmp_path / "q.svg").read_text() == text


def test_only_the_report_imports_matplotlib():
    """Importing it takes longer than the rest of a command's start."""
    code = "import sys; from bench import __main__; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("none", None, "no folder {}/none; {} has: records"),
        ("records", [], "no records in {}/records, which holds notes.txt; run python -m bench"),
        ("records", ["{"], "runs.jsonl, line 1: not a record of python -m bench"),
        (
            "records",
            [{"kind": "ops", "run": {"date": "2026-01-01"}}],
            "runs.jsonl: the ops record of 2026-01-01 lacks 'op', 'title', 'must_move', 'copy_",
        ),
        (
            "records",
            [{**in_loop(), "rows": [{"op": "rope"}]}],
            " lacks 'title', 'implementation', 'forward_calls', ",
        ),
        ("records", [{**traffic(), "run": {"date": "2026-01-01"}}], "lacks 'shape'; delete"),
        ("records", [{**ops(), "op": "gelu"}], "operator 'gelu', but bench/cases.py only rope, "),
    ],
    ids=["no folder", "no record", "broken line", "field", "field of a row", "run", "operator"],
)
def test_a_record_that_cannot_be_read_is_one_line_and_exit_code_2(
    name, lines, message, tmp_path, capsys
):
    path = tmp_path / "records"
    path.mkdir()
    (path / "notes.txt").touch()
    for line in lines or ():
        with open(path / "runs.jsonl", "a") as file:
            file.write(line if isinstance(line, str) else json.dumps(line))
    assert cli.main(["report", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("python -m bench report: ")
    assert message.format(tmp_path, tmp_path) in error
    assert "\n" not in error and not (path / "report.md").exists()


def test_a_missing_folder_of_the_report_is_an_error(full, tmp_path, capsys):
    assert cli.main(["report", str(full), "--out", str(tmp_path / "no")]) == 2
    assert f"--out: no folder {tmp_path / 'no'}; make it first" in capsys.readouterr().err

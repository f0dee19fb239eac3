"""A report tells what the rows of the database say, in one file that needs nothing else."""

import base64
import re
from html import escape

import pytest
from fedforward.server.records import Records, read_run
from fedforward.simulations.report import format_percent, summarise, write_report
from made_runs import TOML, make_run


def images(html):
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]


def test_page_holds_the_numbers_and_stands_alone(tmp_path):
    rows = make_run(tmp_path / "a")
    page = write_report([tmp_path / "a"])
    assert page == tmp_path / "a" / "report.html"
    html = page.read_text()
    total = sum(row["bytes_up"] for row in rows) / 1024
    flops = sum(row["flops"] for row in rows) / 1e6
    for number in ("50.0 %", "0.6667", f"{total:.1f} KiB", f"{flops:.1f} MFLOP", "1.9 MiB", "12 / 0", "03" * 8):
        assert number in html, number
    assert "mono-forward (lr = 0.25)" in html
    assert escape(TOML.format(planned=5)) in html
    assert "fedforward run" in html and "a/experiment.toml" in html
    assert "running/interrupted" not in html
    assert not re.search(r"https?:|<script|<link|@import|url\(|src=\"(?!data:)", html)


def test_pictures_are_embedded_and_lie_beside_the_page(tmp_path):
    make_run(tmp_path / "a")
    embedded = images(write_report([tmp_path / "a"]).read_text())
    assert len(embedded) == 5
    assert sorted(embedded) == sorted(path.read_bytes() for path in (tmp_path / "a").glob("*.png"))


def test_overlay_shows_both_runs(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", rounds=1, clients=1)
    page = write_report([tmp_path / "a", tmp_path / "b"])
    assert page == tmp_path / "report-a-vs-b" / "report.html"
    html = page.read_text()
    assert "<h1>a vs b</h1>" in html
    assert "a/experiment.toml" in html and "b/experiment.toml" in html
    assert "12 / 0" in html and "1 / 0" in html
    assert len(images(html)) == 5
    assert write_report([tmp_path / "a"], tmp_path / "else") == tmp_path / "else" / "report.html"


def test_two_runs_of_one_name_are_both_shown(tmp_path):
    make_run(tmp_path / "x" / "same")
    make_run(tmp_path / "y" / "same", evaluated=False)
    html = write_report([tmp_path / "x" / "same", tmp_path / "y" / "same"]).read_text()
    assert "same vs same (2)" in html
    assert "No data yet: same (2)." in html  # the second one has no accuracy by round


def test_what_a_user_wrote_is_escaped(tmp_path):
    name = "<script>alert('x')</script> $a_1$ & _" + "long-" * 60
    make_run(tmp_path / "a", name=name, failing={(1, 1)}, toml='rule = "</pre><img src=x>"')
    html = write_report([tmp_path / "a"]).read_text()
    assert escape(name) in html and "needs &lt;3 MiB&gt;" in html
    assert not re.search(r"<script|<img src=x|<3 MiB", html)


@pytest.mark.parametrize(("status", "word"), [("running", "running/interrupted"), ("failed", "failed")])
def test_unfinished_run_is_flagged(tmp_path, status, word):
    make_run(tmp_path / "a", rounds=2, status=status)
    assert f"a: {word} after round 2 of 5." in write_report([tmp_path / "a"]).read_text()


def test_failures_are_listed_with_their_reasons(tmp_path):
    make_run(tmp_path / "a", failing={(1, 0), (2, 0), (3, 0), (2, 3)})
    html = write_report([tmp_path / "a"]).read_text()
    assert "Failed client-rounds (4)" in html
    assert html.count("needs &lt;3 MiB&gt;") == 1  # equal reasons are one row
    assert ">4</td><td>0, 3</td><td>1, 2, 3</td><td>needs &lt;3 MiB&gt;</td>" in html


def section(html, title):
    return html.partition(f"<h2>{title}")[2].partition("</section>")[0]


def test_a_fleet_is_told_by_device_and_refusals_are_no_failures(tmp_path):
    make_run(tmp_path / "a", clients=8, fleet=True)
    html = write_report([tmp_path / "a"]).read_text()
    told = [re.findall("<td[^>]*>(.*?)</td>", row) for row in section(html, "Devices").split("<tr>")[2:]]
    share = format_percent(0.95)
    assert told == [
        ["&lt;small&gt;", "976.6 KiB", "2", "927.7 KiB", share, "3", "1 min 5 s", "55.0 %", "adapted: parts of 4"],
        ["&lt;small&gt;", "976.6 KiB", "2", "–", "–", "0", "–", "–", "refused: needs 9 B, has 8 B"],
        ["large", "1.0 GiB", "4", "3.3 MiB", "0.3 %", "0", "3.5 s", "53.0 %", "admitted as asked"],
    ]
    assert "Failed client-rounds" not in html and html.count("needs 9 B, has 8 B") == 1
    assert html.count("over budget</td>") == 2  # clients, the last round of each
    for words in ("Simulated time", "3 min 21 s", "Refused", "Adapted", "Audited", "3 / 0", "Budget"):
        assert words in html, words
    assert len(images(html)) == 6


def test_without_devices_nothing_is_said_of_them(tmp_path):
    make_run(tmp_path / "a")
    html = write_report([tmp_path / "a"]).read_text()
    for words in ("Devices", "Simulated", "Refused", "Budget", "against the budget"):
        assert words not in html, words
    make_run(tmp_path / "b", clients=8, fleet=True)
    html = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both").read_text()
    assert html.count("<h2>Devices of ") == 1 and len(images(html)) == 6
    write_report([tmp_path / "a"], tmp_path / "both")
    assert not (tmp_path / "both" / "devices.png").exists()


def test_picture_without_data_says_so(tmp_path):
    make_run(tmp_path / "a")
    write_report([tmp_path / "a"], tmp_path / "out")
    make_run(tmp_path / "b", rounds=0, status="running", toml="")
    html = write_report([tmp_path / "b"], tmp_path / "out").read_text()
    assert len(images(html)) == 1  # the initial model's accuracy
    assert html.count("No data yet") == 4
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["accuracy.png"]  # none is left of run a


def test_run_of_which_nothing_is_committed(tmp_path):
    Records(tmp_path / "a").close()
    html = write_report([tmp_path / "a"]).read_text()
    assert "running/interrupted before its first round" in html
    assert summarise(read_run(tmp_path / "a"))["rounds"] is None


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one run"):
        write_report([])
    with pytest.raises(FileNotFoundError, match=re.escape("run.sqlite")):
        write_report([tmp_path])

"""Numbers for humans."""

from fedforward.simulations.formats import format_bytes, format_flops, format_percent, format_seconds


def test_bytes_and_percent_are_written_for_humans():
    assert [format_bytes(n) for n in (0, 312, 1023.7, 1024, 1.5 * 2**20, 2**30 - 1)] == [
        "0 B",
        "312 B",
        "1.0 KiB",
        "1.0 KiB",
        "1.5 MiB",
        "1.0 GiB",
    ]
    assert [format_percent(x) for x in (0.973, 1, 0.0)] == ["97.3 %", "100.0 %", "0.0 %"]
    assert {format_bytes(None), format_percent(None), format_percent(float("nan"))} == {"–"}


def test_seconds_and_flops_are_written_for_humans():
    written = [format_seconds(t) for t in (0.25, 12.34, 60, 3599, 3900, None)]
    assert written == ["0.25 s", "12.3 s", "1 min 0 s", "59 min 59 s", "1 h 5 min", "–"]
    assert [format_flops(n) for n in (999, 1000, 2.5e9)] == ["999 FLOP", "1.0 kFLOP", "2.5 GFLOP"]

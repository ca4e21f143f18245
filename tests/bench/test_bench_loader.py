"""bench.loader on a few images: every row, and rates that fit together."""

import csv

from bench import loader


def test_every_part_and_placement(tmp_path, capsys):
    flags = "--device cpu --arch smallresnet --image-size 8 --images 512 --batch-size 8 --attack-steps 1"
    flags += f" --precision fp32 --steps 2 --rounds 2 --folder {tmp_path} --out {tmp_path / 'loader.csv'}"
    loader.main(flags.split())
    with (tmp_path / "loader.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = [(row["part"], row["placement"]) for row in rows]
    assert parts == [("gather", "stream")] + [(p, w) for p in ("loader", "step") for w in ("device", "stream")]
    for row in rows:
        megabytes = float(row["batches_per_s"]) * 8 * 3 * 64 / 1e6
        assert abs(1e3 * float(row["gb_per_s"]) - megabytes) < 0.01 * megabytes
    assert [row["relative"] for row in rows[1::2]] == ["1.000", "1.000"]
    assert [path.name for path in tmp_path.iterdir()] == ["loader.csv"]
    assert "gather" in capsys.readouterr().out

"""Reading Parquet from memory: what a short program needs to end as it should."""

import io
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from draf_dist.storage.parquet import read_parquet

PROGRAM = """
import sys
from pathlib import Path
import draf_dist.data.release
from draf_dist.storage.parquet import read_parquet
read_parquet(Path(sys.argv[1]).read_bytes())
"""


def content() -> bytes:
    buffer = io.BytesIO()
    names = [f"column_{i}" for i in range(6)]
    pq.write_table(pa.table({name: [f"{name} {row}" for row in range(50)] for name in names}), buffer, compression="zstd")
    return buffer.getvalue()


def test_a_table_comes_back_as_it_was_written() -> None:
    table = read_parquet(content())
    assert (table.num_rows, table.num_columns) == (50, 6)
    assert table["column_5"][49].as_py() == "column_5 49"


def test_a_program_that_ends_right_after_reading_does_not_abort(tmp_path: Path) -> None:
    """With a buffer of Python's own about every third one did, so four mostly show it."""
    (tmp_path / "table.parquet").write_bytes(content())
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "table.parquet")]
    ended = []
    for _ in range(2):
        pair = [subprocess.Popen(command) for _ in range(2)]
        ended += [process.wait(60) for process in pair]
    assert ended == [0] * 4

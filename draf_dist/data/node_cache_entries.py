"""What the index of a node cache can be told and asked, within one transaction of it: rows, and the files that they are about."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge

from draf_dist.data.node_cache_folder import Block, BlockKey, CacheFolder, LiveLease
from draf_dist.data.node_cache_holds import Hold

Connection = sqlite3.Connection

VERSION = 1
# The job of blocks that were found in the folder, and of those of a job that begins anew.
_NOBODY = 0
_FOR_EVER = 2**62
_NEW = "INSERT INTO block (content, number, size, maker, job, last) VALUES (?, ?, ?, ?, ?, ?)"
SCHEMA = f"""
BEGIN;
CREATE TABLE job (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
INSERT INTO job VALUES ({_NOBODY}, '');
CREATE TABLE block (
    id INTEGER PRIMARY KEY, content TEXT NOT NULL, number INTEGER NOT NULL, size INTEGER NOT NULL,
    maker TEXT,                              -- the fetch that is making it
    job INTEGER NOT NULL, last INTEGER NOT NULL,  -- who asked last, and until when
    UNIQUE (content, number));
CREATE INDEX may_go ON block (job, last) WHERE maker IS NULL;
CREATE INDEX in_making ON block (maker) WHERE maker IS NOT NULL;
CREATE TABLE need (block INTEGER, job INTEGER, until INTEGER NOT NULL, PRIMARY KEY (block, job)) WITHOUT ROWID;
CREATE TABLE total (bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER more AFTER INSERT ON block BEGIN UPDATE total SET bytes = bytes + NEW.size; END;
CREATE TRIGGER other AFTER UPDATE OF size ON block BEGIN UPDATE total SET bytes = bytes + NEW.size - OLD.size; END;
CREATE TRIGGER less AFTER DELETE ON block BEGIN
    UPDATE total SET bytes = bytes - OLD.size;
    DELETE FROM need WHERE block = OLD.id;
END;
PRAGMA user_version = {VERSION};
COMMIT;
"""


@dataclass(frozen=True)
class Claim:
    """What came of asking: blocks that are there, those to be made by the asker (under a hold), others with who fetches them."""

    found: dict[BlockKey, Block] = field(default_factory=dict)
    mine: list[BlockKey] = field(default_factory=list)
    hold: Hold | None = None
    awaited: dict[BlockKey, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Freed:
    """What was evicted, and how many bytes are above the limit although nothing else may go."""

    blocks: int = 0
    size_bytes: int = 0
    over_bytes: int = 0


def check(connection: Connection, folder: CacheFolder) -> None:
    """Compares the index with the files, where nobody else is alive; what raises here makes `run` build it anew."""
    if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
        raise sqlite3.DatabaseError("the index of the cache is damaged")
    clear_dead_fetches(connection, folder)
    adopt(connection, folder)


def total_bytes(connection: Connection) -> int:
    """The bytes of all blocks, those that are being written included."""
    (size,) = connection.execute("SELECT bytes FROM total").fetchone()
    return int(size)


def claim(connection: Connection, folder: CacheFolder, job: str, until: Mapping[BlockKey, int]) -> Claim:
    """Writes down that a job needs blocks, opens those that are there, and takes it upon the asker to make those nobody makes."""
    asker, found = _job_id(connection, job), {}
    mine: dict[BlockKey, int] = {}
    awaited: dict[BlockKey, str] = {}
    dead: set[str] = set()
    for key, step in until.items():
        known = connection.execute("SELECT id, size, maker FROM block WHERE content = ? AND number = ?", key).fetchone()
        if known and known[2] is None and (block := _opened(connection, folder, key, known[:2])):
            found[key] = block
        elif known and known[2] is not None and known[2] not in dead and folder.is_fetching(known[2]):
            awaited[key] = known[2]
        else:
            dead.update({known[2]} - {None} if known else ())
            mine[key] = step
            continue
        _need(connection, known[0], asker, step)
    if not mine:
        return Claim(found, awaited=awaited)
    for fetch in dead:
        abandon(connection, folder, fetch)
        folder.clear_fetch(fetch)
    hold = folder.begin_fetch()
    try:
        for key, step in mine.items():
            begun = connection.execute(_NEW, (*key, 0, hold.path.name, asker, step)).lastrowid
            connection.execute("INSERT INTO need VALUES (?, ?, ?)", (begun, asker, step))
    except BaseException:
        folder.end_fetch(hold)
        raise
    return Claim(found, list(mine), hold, awaited)


def there(connection: Connection, folder: CacheFolder, job: str, until: Mapping[BlockKey, int]) -> dict[BlockKey, Block]:
    """Writes down that a job needs those of the blocks that are there, and opens them."""
    asker, found = _job_id(connection, job), {}
    for key, step in until.items():
        known = connection.execute("SELECT id, size FROM block WHERE content = ? AND number = ? AND maker IS NULL", key).fetchone()
        if known and (block := _opened(connection, folder, key, known)):
            _need(connection, known[0], asker, step)
            found[key] = block
    return found


def need_again(connection: Connection, job: str, until: Mapping[BlockKey, int]) -> None:
    """Writes down once more what a process needs, in an index that has not heard of it."""
    asker = _job_id(connection, job)
    for key, step in until.items():
        known = connection.execute("SELECT id FROM block WHERE content = ? AND number = ?", key).fetchone()
        if known:
            _need(connection, known[0], asker, step)


def reserve(connection: Connection, fetch: str, sizes: Mapping[BlockKey, int]) -> None:
    """Books the bytes of blocks that are about to be written."""
    for key, size in sizes.items():
        known = connection.execute("UPDATE block SET size = ?, maker = ? WHERE content = ? AND number = ?", (size, fetch, *key))
        if not known.rowcount:  # the index was made anew meanwhile
            connection.execute(_NEW, (*key, size, fetch, _NOBODY, 0))


def publish(connection: Connection, fetch: str) -> None:
    """The blocks of a fetch lie in their places now."""
    connection.execute("UPDATE block SET maker = NULL WHERE maker = ?", (fetch,))


def abandon(connection: Connection, folder: CacheFolder, fetch: str) -> None:
    """Takes back what a fetch has begun and not published."""
    for row in connection.execute("SELECT content, number FROM block WHERE maker = ?", (fetch,)).fetchall():
        folder.remove_block(row)
    connection.execute("DELETE FROM block WHERE maker = ?", (fetch,))


def forget(connection: Connection, folder: CacheFolder, key: BlockKey, inode: int | None) -> None:
    """Drops a block, unless another than the one seen (inode) lies there by now or is being made."""
    block = folder.open_block(key)
    if block is None or inode in (None, block.inode):
        row = connection.execute("SELECT id FROM block WHERE content = ? AND number = ? AND maker IS NULL", key).fetchone()
        if row:
            folder.remove_block(key)
            connection.execute("DELETE FROM block WHERE id = ?", row)


def clear_dead_fetches(connection: Connection, folder: CacheFolder) -> None:
    """Removes what killed processes have left half-done, files and booked bytes."""
    makers = {maker for (maker,) in connection.execute("SELECT DISTINCT maker FROM block WHERE maker IS NOT NULL")}
    for fetch in makers.union(folder.fetches()):
        if not folder.is_fetching(fetch):
            abandon(connection, folder, fetch)
            folder.clear_fetch(fetch)


def begin_job(connection: Connection, job: str, live: Sequence[LiveLease]) -> None:
    """What an earlier attempt of a job has needed counts no more: the next one, maybe from an earlier step, says it anew.

    Nor does what others have needed who are not alive: most of them never come back.
    """
    number = _job_id(connection, job)
    alive = sorted({_job_id(connection, lease.name) for lease in live})
    connection.execute(f"DELETE FROM need WHERE job NOT IN ({', '.join('?' * len(alive))})", alive)
    connection.execute("UPDATE block SET job = ? WHERE job = ?", (_NOBODY, number))
    gone = "DELETE FROM job WHERE id NOT IN (?, ?) AND id NOT IN (SELECT job FROM block) AND id NOT IN (SELECT job FROM need)"
    connection.execute(gone, (_NOBODY, number))


def make_room(connection: Connection, folder: CacheFolder, limit_bytes: int) -> Freed:
    """Evicts what no live job needs until the limit holds, if it can."""
    if total_bytes(connection) <= limit_bytes:
        return Freed()
    clear_dead_fetches(connection, folder)
    excess = total_bytes(connection) - limit_bytes
    return evict(connection, folder, excess) if excess > 0 else Freed()


def evict(connection: Connection, folder: CacheFolder, size_bytes: int) -> Freed:
    """Evicts at least so many bytes, if so much is not needed: first what belongs to no live job, then by the oldest `until`."""
    live = _reached(connection, folder.live_leases())
    victims, moved, freed = [], [], 0
    for block, content, number, size in _candidates(connection, live):
        if freed >= size_bytes:
            break
        needs = connection.execute("SELECT job, until FROM need WHERE block = ?", (block,)).fetchall()
        still = [(job, until, block) for job, until in needs if job in live and until >= live[job]]
        if still:
            moved.append(max(still, key=lambda need: need[1]))
            continue
        # Before the row: on a full disk the row can go only when there is room again, and a row without a file does no harm.
        folder.remove_block((content, number))
        victims.append((block,))
        freed += size
    connection.executemany("DELETE FROM block WHERE id = ?", victims)
    # Under the job that needs it, it is not looked at again before that job is past it.
    connection.executemany("UPDATE block SET job = ?, last = ? WHERE id = ?", moved)
    return Freed(len(victims), freed, max(size_bytes - freed, 0))


def _candidates(connection: Connection, live: Mapping[int, int]) -> Iterator[tuple[int, str, int, int]]:
    """Blocks that the job that asked last is done with, first to go first."""
    query = "SELECT id, content, number, size, job, last FROM block WHERE job = ? AND maker IS NULL AND last < ? ORDER BY last"
    jobs = [job for (job,) in connection.execute("SELECT id FROM job")]
    streams = [connection.execute(query, (job, live.get(job, _FOR_EVER))) for job in jobs]
    # Last, what a live job is past (it may come back to it in the next epoch); before it, what may be of the attempt before.
    value = {job: 2 if job in live else 1 if job == _NOBODY else 0 for job in jobs}
    return (row[:4] for row in merge(*streams, key=lambda row: (value[row[4]], row[5])))


def _reached(connection: Connection, leases: list[LiveLease]) -> dict[int, int]:
    """Live jobs and the step that the slowest of their processes has reached."""
    reached: dict[int, int] = {}
    for lease in leases:
        job = _job_id(connection, lease.name)
        reached[job] = min(lease.step, reached.get(job, lease.step))
    return reached


def _job_id(connection: Connection, name: str) -> int:
    known = connection.execute("SELECT id FROM job WHERE name = ?", (name,)).fetchone()
    if known:
        return int(known[0])
    made = connection.execute("INSERT INTO job (name) VALUES (?)", (name,)).lastrowid
    assert made is not None
    return made


def _need(connection: Connection, block: int, job: int, until: int) -> None:
    connection.execute(
        "INSERT INTO need VALUES (?, ?, ?) ON CONFLICT (block, job) DO UPDATE SET until = max(until, excluded.until)",
        (block, job, until),
    )
    asked = "UPDATE block SET last = CASE job WHEN ?2 THEN max(last, ?3) ELSE ?3 END, job = ?2 WHERE id = ?1"
    connection.execute(asked, (block, job, until))


def _opened(connection: Connection, folder: CacheFolder, key: BlockKey, known: tuple[int, int]) -> Block | None:
    """The block; a file that is gone or has another size is no block, and its row goes."""
    block = folder.open_block(key)
    if block is not None and block.size == known[1]:
        return block
    folder.remove_block(key)
    connection.execute("DELETE FROM block WHERE id = ?", known[:1])
    return None


def adopt(connection: Connection, folder: CacheFolder) -> None:
    """Makes the index say what the files say; fetches that run are of no concern, they book what they write."""
    lying = folder.blocks()
    stray = []
    for block, content, number, size in connection.execute("SELECT id, content, number, size FROM block WHERE maker IS NULL"):
        if lying.pop((content, number), None) != size:
            stray.append((block, content, number))
    for block, content, number in stray:
        folder.remove_block((content, number))
        connection.execute("DELETE FROM block WHERE id = ?", (block,))
    # Ignored: those that a fetch which still runs has written.
    connection.executemany(
        _NEW.replace("INSERT", "INSERT OR IGNORE"), ((*key, size, None, _NOBODY, 0) for key, size in lying.items())
    )

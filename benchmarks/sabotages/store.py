"""Faults in store."""

from benchmarks.sabotages.sabotage_class import Sabotage

STORE = (
    Sabotage(
        name="shard marked before its values",
        file="extract/job/extraction.py",
        old="    writer.write(split, number, shard.tokens, shard.status)\n",
        new="    writer.mark(split, number, shard.status)\n"
        "    writer.write(split, number, shard.tokens, shard.status)\n",
        tests=("tests/extract/test_resume.py::test_a_shard_whose_values_cannot_be_written_is_not_marked",),
    ),
    Sabotage(
        name="lock never checked",
        file="store/writer.py",
        old="        if self._lock:\n",
        new="        if False:\n",
        tests=("tests/store/test_lock.py",),
    ),
    Sabotage(
        name="missing shards taken for whole",
        file="store/writer.py",
        old="if status[shards.rows(shard).start] == MISSING]\n\n    def commit",
        new="if status[shards.rows(shard).start] == MISSING and shard == 0]\n\n    def commit",
        tests=("tests/extract/test_resume.py::test_a_lost_mark_is_one_shard_again", "tests/store/test_store.py"),
    ),
    Sabotage(
        name="digest of a shard left out",
        file="store/writer.py",
        old="        wait([self._open(split, DIGEST)[shard].write(np.array(list(digests), np.uint32))], doing)\n",
        new="",
        tests=("tests/store/test_verify.py::test_a_whole_store_is_sound",),
    ),
    Sabotage(
        name="rows read without their checksum",
        file="store/local/chunks.py",
        old="for number, place in enumerate(places) if not version.checked[place]]",
        new="for number, place in enumerate(places) if False]",
        tests=("tests/store/test_chunks.py",),
    ),
    Sabotage(
        name="files never synced",
        file="store/local/durable_files.py",
        old="pool.submit(os.fsync, file)",
        new="pool.submit(int, file)",
        tests=("tests/store/test_power_loss.py",),
    ),
)

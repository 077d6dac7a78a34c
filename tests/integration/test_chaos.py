"""A run on a Ray cluster and S3 that loses a worker, its server and a node in turn is the run that nothing happened to.

benchmarks/chaos_training.py does that with every kind of failure, and with workers at twenty moments.
"""

import random
from pathlib import Path

import pytest
from disturbed_moments import at_put, in_step
from disturbed_runs import DisturbedRun, a_place, held, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_that_lost_a_worker_a_node_and_its_server_is_the_undisturbed_run(tmp_path: Path) -> None:
    draw = random.Random(6)
    with a_place(tmp_path, raylets=2, epochs=6) as place:
        expected = undisturbed(place)
        run = DisturbedRun(place, "disturbed")
        run.start()
        run.kill(*at_put(draw, 7, "uploading its part", "rank-00000.safetensors").wait(run))
        run.wait_for_new_step()
        with held(run, "PUT", "manifest.json") as arrived:
            run.until(arrived)
            place.server.stop()
            place.server.start()
        in_step(draw, 20).wait(run)
        nodes = [place.ray.node_of(seen.pid) for seen in run.seen()]
        place.ray.kill_node(next(node for node in nodes if node))
        run.failed("raylet")
        run.wait_for_new_step()
        run.finish()
        assert run.wrong(expected) == []
        assert [failure.seconds is not None for failure in run.failures] == [True, True]
        assert len(run.ledger("attempt")) == 3

"""Runs one step of a job on two SLURM jobs as workers, by the recipe of docs/clusters.md; benchmarks/slurm.sh calls it.

python -m benchmarks.slurm_job extract|run PIPELINE.YAML [SECTION.KEY=VALUE ...]
"""

import argparse
from collections.abc import Sequence

import sidecache as sc


def work(step: str, pipeline: str, overrides: Sequence[str]) -> None:
    """Start the workers, and run the step on them."""
    from dask_jobqueue import SLURMCluster  # in the extra `dev`

    with SLURMCluster(
        queue="cpu",
        cores=1,
        job_cpu=1,
        memory="4GB",
        walltime="01:00:00",
        interface="lo",
    ) as cluster:
        print(cluster.job_script(), flush=True)
        cluster.adapt(minimum_jobs=2, maximum_jobs=2)
        address = cluster.scheduler_address
        schedulers = [
            f"{section}.{key}" for section in ("extract", "train") for key in (f"scheduler={address}", "workers=2")
        ]
        config = sc.load_config(pipeline, [*schedulers, *overrides])
        if step == "extract":
            done = sc.extract(config)
            print(f"{done.samples_written} samples in {done.shards_written} shards, {done.retries} retries")
        else:
            rows = sc.run(config)
            print(f"{len(rows)} trials")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("extract", "run"))
    parser.add_argument("pipeline")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    work(args.step, args.pipeline, args.overrides)


if __name__ == "__main__":
    main()

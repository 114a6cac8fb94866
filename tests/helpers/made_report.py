"""A made-up run of nineteen methods, with everything that a report can show of them."""

import hashlib
from pathlib import Path

import numpy as np
from made_predictions import make_predictions
from result_rows import make_row

from adapt.run_dir.curves import Curve, write_curve
from adapt.run_dir.job_record import JobRecord, write_job_record
from adapt.run_dir.predictions import Predictions, predictions_path, write_predictions
from adapt.run_dir.results import Row, write_results

FROM_CACHE = (
    *("linear_probe", "losa", "ladder", "attentive_probe", "efficient_probe", "head2toe", "knn", "last"),
    *("layer_fusion", "transformer_probe", "conv_ladder"),
)
END_TO_END = ("lora", "adapters", "compacter", "bitfit", "prompt", "full", "kronecker", "lepe")
OF_ONE_SEED = ("full", "lepe")
N_SAMPLES, N_CLASSES, N_EPOCHS = 200, 10, 8


def nineteen_methods(run_dir: Path) -> list[Row]:
    """Write the run; most methods have three seeds, two have one, and end-to-end methods have no break-even point."""
    draw, rows = np.random.default_rng(3), []
    for method in (*FROM_CACHE, *END_TO_END):
        costs = _costs(method, draw)
        accuracy = draw.uniform(0.78, 0.95)
        for seed in (0,) if method in OF_ONE_SEED else (0, 1, 2):
            trial_id = hashlib.sha256(f"{method}-{seed}".encode()).hexdigest()[:16]
            trial = _predictions(trial_id, accuracy, draw)
            top1 = 100 * float((trial.logits.argmax(axis=1) == trial.labels).mean())
            rows.append(make_row(method, seed, trial_id=trial_id, top1=top1, top5=99.0, **costs))
            write_predictions(predictions_path(run_dir, rows[-1]), trial)
            write_curve(run_dir, _curve(rows[-1]))
    write_results(run_dir, rows)
    versions = {"python": "3.12.1", "sidecache": "0.1.0", "torch": "2.7.0", "timm": "1.0.21", "numpy": "2.0.0"}
    machine = {"processor": "A processor of some name", "cores": 64, "gpu": "A GPU of some name"}
    command = "sidecache run pipeline.yaml -o train.epochs=8 -o run_dir=runs/nineteen-methods-of-a-made-up-run"
    write_job_record(run_dir, JobRecord(date="2026-12-01 09:30", command=command, versions=versions, **machine))
    return rows


def _costs(method: str, draw: np.random.Generator) -> dict:
    is_end_to_end = method in END_TO_END
    n_params = 0 if method in ("linear_probe", "knn", "head2toe") else int(10 ** draw.uniform(3, 7))
    return {
        "feature_source": "images" if is_end_to_end else "resident",
        "trainable_params": 85_798_656 if method == "full" else n_params,
        "samples_per_second": draw.uniform(20, 60) if is_end_to_end else draw.uniform(900, 6000),
        "peak_memory_bytes": int((draw.uniform(2000, 9000) if is_end_to_end else draw.uniform(150, 500)) * 2**20),
        "extract_seconds": 24.3,
        "store_bytes": 177 * 2**20,
        "break_even_epochs": None if is_end_to_end else draw.uniform(1.1, 2.2),
        "inference_gflops": draw.uniform(35.1, 38.0),
    }


def _predictions(trial_id: str, accuracy: float, draw: np.random.Generator) -> Predictions:
    made = make_predictions(draw.random(N_SAMPLES) < accuracy, trial_id, N_CLASSES)
    logits = 3 * made.logits + draw.normal(size=made.logits.shape, scale=0.5)
    return Predictions(**{**vars(made), "logits": logits.astype(np.float32)})


def _curve(row: Row) -> Curve:
    fields = {name: getattr(row, name) for name in ("trial_id", "method", "options", "lr", "weight_decay", "seed")}
    epochs = np.arange(1, N_EPOCHS + 1)
    loss, score = (2 / epochs).tolist(), (row.top1 - 30 / epochs).tolist()
    return Curve(**fields, train_loss=loss, val_score=score, val_loss=loss)

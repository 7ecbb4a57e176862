"""Estimate a step on 1 to 1,024 GPUs, without one: memory, bytes, time. Writes a table and a picture.

    python benchmarks/many_gpus.py

`scripts/doctor.py --world_size` counts the operations and bytes of a step and starts no process; the time
follows from its assumptions (docs/communication.md). Writes benchmarks/results/many_gpus.json,
docs/many_gpus.png and the tables of docs/communication.md.
"""

from collections.abc import Sequence

from harness import ROOT, fill_table, line_chart, markdown_table, provenance, write_result

from tinystories_slm.config.command_args.doctor import ScaleDoctorArgs
from tinystories_slm.config.flags import to_flags
from tinystories_slm.config.parse import parse
from tinystories_slm.doctor.many_gpus import ScalingEstimate, cluster_of, estimate_scaling, estimate_step
from tinystories_slm.doctor.paper_step import count_ddp
from tinystories_slm.doctor.resources import vocab_size
from tinystories_slm.io.units import format_bytes
from tinystories_slm.model_costs import flops_per_token

PAGE, PICTURE = ROOT / "docs" / "communication.md", ROOT / "docs" / "many_gpus.png"
WORLD_SIZES = [2**power for power in range(11)]
SHOWN = (1, 8, 64, 256, 1024)
MIN_GAIN = 1.5
"""Twice the GPUs are worth it as long as a step gets this much faster."""
MIN_EFFICIENCY = 0.8


BATCH_SIZE = 1024
"""Sequences of a step, which all GPUs share."""
Shape = Sequence[str]
"""Flags of a configuration."""

_1B = {
    "data.seq_len": 1024, "tokenizer.vocab_size": 50_257, "model.family": "llama", "model.qk_norm": True,
    "model.hidden_size": 2048, "model.num_hidden_layers": 18, "model.num_attention_heads": 16,
}  # fmt: skip
SHAPES = {
    "9M": ["--config", "configs/9m.yaml"],
    "51M": ["--config", "configs/51m.yaml"],
    "1B": to_flags(_1B),
}


def main() -> None:
    rows = [
        to_row(name, size, each)
        for name, shape in SHAPES.items()
        for size in WORLD_SIZES
        for each in estimate_scaling(scale_args(shape, size))
    ]
    batches = {name: [smallest_batch(shape, size) for size in SHOWN[1:]] for name, shape in SHAPES.items()}
    write_result("many_gpus", provenance() | {"rows": rows, "smallest_batches": batches})
    fill_table(PAGE, "benchmarks/many_gpus.py", table_of(rows))
    fill_table(PAGE, "benchmarks/many_gpus.py, batch", batch_table(batches))
    draw(rows)


def scale_args(shape: Shape, world_size: int) -> ScaleDoctorArgs:
    """Return the options of the doctor for `shape` on `world_size` GPUs."""
    # The folder has no token files: the configuration decides the vocabulary.
    flags = [f"--train.batch_size={BATCH_SIZE}", "--data.data_dir=data/none", f"--world_size={world_size}"]
    return parse(ScaleDoctorArgs, [*shape, *flags])


def to_row(name: str, world_size: int, estimate: ScalingEstimate) -> dict:
    return {
        "shape": name,
        "world_size": world_size,
        "distribution": estimate.distribution,
        "memory_bytes": estimate.memory_bytes,
        "num_collectives": len(estimate.collectives),
        "sent_bytes": round(estimate.sent_bytes),
        "step_s": estimate.step.total_s,
        "compute_s": estimate.step.compute_s,
        "efficiency": estimate.step.efficiency,
    }


def most_useful(rows: list[dict], name: str, distribution: str) -> int:
    """Return the number of GPUs up to which each doubling makes a step `MIN_GAIN` times as fast."""
    steps = {
        row["world_size"]: row["step_s"]
        for row in rows
        if (row["shape"], row["distribution"]) == (name, distribution)
    }
    steps.setdefault(1, one_gpu_s(rows, name))
    size = 1
    while 2 * size in steps and steps[size] / steps[2 * size] >= MIN_GAIN:
        size *= 2
    return size


def one_gpu_s(rows: list[dict], name: str) -> float:
    return next(row["step_s"] for row in rows if (row["shape"], row["world_size"]) == (name, 1))


def smallest_batch(shape: Shape, world_size: int) -> dict:
    """Return the smallest batch of all GPUs at which a step with DDP has `MIN_EFFICIENCY`."""
    args = scale_args(shape, world_size)
    model_config = args.model_config(vocab_size=vocab_size(args))
    communication, seq_len = count_ddp(args, model_config), args.data.seq_len
    rows, efficiency = 0, 0.0
    while efficiency < MIN_EFFICIENCY:
        rows += 1
        step_flops = rows * world_size * seq_len * flops_per_token(model_config, seq_len)
        step = estimate_step(communication, cluster_of(args), step_flops=step_flops, num_micro_batches=1)
        efficiency = step.efficiency
    batch_size = rows * world_size
    return {"world_size": world_size, "batch_size": batch_size, "tokens": batch_size * seq_len}


def table_of(rows: list[dict]) -> str:
    head = [
        "shape",
        "GPUs",
        "distribution",
        "memory a GPU",
        "collectives",
        "sent a GPU",
        "step, ms",
        "efficiency",
    ]
    shown = [
        [
            row["shape"], f"{row['world_size']:,}", row["distribution"], format_bytes(row["memory_bytes"]),
            row["num_collectives"], format_bytes(row["sent_bytes"]), f"{1e3 * row['step_s']:,.3g}",
            f"{row['efficiency']:.0%}",
        ]
        for row in rows
        if row["world_size"] in SHOWN
    ]  # fmt: skip
    useful = ", ".join(
        f"{name} {most_useful(rows, name, 'DDP'):,} (DDP) and {most_useful(rows, name, 'FSDP2'):,} (FSDP2)"
        for name in SHAPES
    )
    text = f"Each doubling makes a step {MIN_GAIN} times as fast up to: {useful}."
    return f"{markdown_table(head, shown)}\n{text}\n"


def batch_table(batches: dict[str, list[dict]]) -> str:
    head = ["shape", *(f"{size:,} GPUs" for size in SHOWN[1:])]
    return markdown_table(
        head, [[name, *(f"{each['tokens']:,}" for each in sizes)] for name, sizes in batches.items()]
    )


def draw(rows: list[dict]) -> None:
    """Draw how many times as fast a step is as on one GPU."""
    with line_chart(PICTURE, xlabel="GPUs", ylabel="times as fast as one GPU") as axes:
        axes.plot(WORLD_SIZES, WORLD_SIZES, color="gray", linestyle=":", label="ideal")
        for color, name in zip(("tab:blue", "tab:orange", "tab:green"), SHAPES, strict=True):
            for distribution, style in (("DDP", "-"), ("FSDP2", "--")):
                shown = [row for row in rows if (row["shape"], row["distribution"]) == (name, distribution)]
                sizes = [row["world_size"] for row in shown]
                speedups = [one_gpu_s(rows, name) / row["step_s"] for row in shown]
                axes.plot(sizes, speedups, style, color=color, label=f"{name}, {distribution}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)


if __name__ == "__main__":
    main()

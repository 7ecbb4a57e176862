# %% [markdown]
# # 4. Training, and watching it
#
# A new model has random weights and predicts every token equally badly. Training changes the weights a
# little, many times, so that the loss falls. This notebook writes the loop by hand, then starts a run of the
# package and watches it.

# %% [markdown]
# ## The loop by hand
#
# Each step has four lines: compute the loss of a few stories, compute how the loss changes with every weight
# (`backward`), change the weights (`optimizer.step`), and reset. AdamW ([Loshchilov and Hutter,
# 2019](https://arxiv.org/abs/1711.05101)) decides the size of each change.

# %%
from tinystories_slm import grammar

torch.manual_seed(0)
small = AutoModelForCausalLM.from_config(model.config)  # the same shape, random weights
optimizer = torch.optim.AdamW(small.parameters(), lr=2e-3)
stories = list(grammar.generate_corpus(480, seed=0))
losses = []
for first in range(0, len(stories), 8):
    batch = tokenizer(stories[first : first + 8], return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)  # padding is not trained on
    loss = small(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss of the first step {losses[0]:.2f}, of the last step {losses[-1]:.2f}")

# %% [markdown]
# ## A run of the package
#
# The package has the same loop, with fast kernels, a learning rate that rises and falls, checkpoints and
# records. A configuration is a file and flags. This run has a third of the steps of the course's model, and
# scores held-out stories every 40 steps.

# %%
flags = (
    "--config configs/course.yaml --output_dir runs/watched --train.resume never "
    "--train.max_steps 200 --train.eval_every 40 --train.eval_stories 40"
)
config = parse_config(flags.split())

# %% [markdown]
# `train` writes a line to `metrics.jsonl` every ten steps. It runs in a thread, so that this cell can draw
# the newest losses while it trains. Interrupt the kernel to stop watching; the run goes on.

# %%
from threading import Thread

from IPython.display import clear_output

from tinystories_slm.runs.records import entropy_per_token
from tinystories_slm.runs.run_dir import RunDir

run = RunDir(config.output_dir)


def plot_losses():
    lines = run.read_metrics()
    _, axes = plt.subplots(figsize=(6, 3.4))
    for name, style, label in (("train/loss", "-", "training"), ("val/loss", "o", "held-out stories")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot([step for step, _ in points], [value for _, value in points], style, label=label)
    axes.set(xlabel="step", ylabel="nats per token", xlim=(0, config.train.max_steps), yscale="log")
    axes.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    if (manifest := run.load_manifest()) is not None:
        axes.axhline(
            entropy_per_token(manifest), color="black", linestyle="--", label="entropy of the corpus"
        )
    axes.grid(alpha=0.3)
    axes.legend()
    plt.show()


logging.getLogger("tinystories_slm").setLevel(logging.WARNING)  # the figure shows the progress
worker = Thread(target=train, args=(config,))
worker.start()
while worker.is_alive():
    worker.join(timeout=3)
    clear_output(wait=True)
    plot_losses()

# %% [markdown]
# The first loss is close to ln(vocabulary): all tokens are equally probable. The first hundred steps learn
# which tokens are common and which follow each other. Names that agree over a whole story come last.
#
# ## What the model wrote on the way
#
# At each evaluation, the run wrote a story to `samples.md`.

# %%
for step, text in run.read_samples():
    print(f"step {step}: {text[:230]!r}\n")

# %% [markdown]
# ## The learning rate
#
# The learning rate scales every change of the weights. It rises during the warm-up, because the first
# gradients of random weights are large and of little use, and then falls along half a cosine ([Loshchilov and
# Hutter, 2017](https://arxiv.org/abs/1608.03983)), so that the last steps are small.

# %%
lines = [line for line in run.read_metrics() if "train/lr" in line]
figure, axes = plt.subplots(figsize=(6, 2.6))
axes.plot([line["step"] for line in lines], [line["train/lr"] for line in lines], "o-")
axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Exercise 1
#
# What loss, in nats per token, does a model have that gives all tokens of the vocabulary the same
# probability? Compare it with the first loss of the loop above.

# %% tags=["exercise"]
uniform_loss = 0.0  # your code

# %% tags=["check"]
is_right = abs(losses[0] - uniform_loss) < 0.3
print("Exercise 1:", "correct" if is_right else "not yet")

# %% [markdown]
# ## Exercise 2
#
# Write the learning rate of a step as a function: `peak * (step + 1) / warmup` in the first `warmup` steps,
# which are numbered from 0. After them, `peak * (1 + cos(pi * fraction)) / 2`, where `fraction` grows from `1
# / (steps - warmup)` in the first step after the warm-up to 1 in the last one. The check compares it with the
# run.

# %% tags=["exercise"]
import math


def learning_rate(step, *, peak, warmup, steps):
    return peak  # your code


# %% tags=["check"]
args = config.train
options = {"peak": args.lr, "warmup": args.warmup_steps, "steps": args.max_steps}
is_right = all(
    math.isclose(line["train/lr"], learning_rate(line["step"] - 1, **options), abs_tol=1e-9) for line in lines
)
print("Exercise 2:", "correct" if is_right else "not yet")

# %% [markdown]
# More of a run: `runs/watched/report.html` shows its curves, stories and settings as a page.
#
# Next: [how the model's probabilities become a story](5_sampling.ipynb).

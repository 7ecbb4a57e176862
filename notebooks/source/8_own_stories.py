# %% [markdown]
# # 8. Your own stories
#
# The model of the course knows one kind of story. Here it learns another: yours. Training that starts from
# the weights of another run is called **fine-tuning**.

# %% [markdown]
# ## Stories in a file
#
# The package reads parquet, JSONL, CSV, JSON and text. In a text file, a line `<|endoftext|>` separates two
# stories. A few hundred short ones are enough here; these come from a template. Replace them by your own, if
# you have any.

# %%
import random
from pathlib import Path

NAMES = ["Bip", "Zap", "Luma", "Rolo", "Tik"]
PLACES = ["a garage", "a ship", "a tall tower", "an old mine", "a school"]
THINGS = ["a red bolt", "a new wheel", "some oil", "a bright lamp", "a long wire"]
HELPERS = ["a snail", "the moon", "a little girl", "an old clock"]
LESSONS = ["to ask for help", "to look twice", "to wait", "to share"]


def write_story(number):
    """Return story `number` of a small robot."""
    name, place, thing, helper, lesson = map(
        random.Random(number).choice, (NAMES, PLACES, THINGS, HELPERS, LESSONS)
    )
    return (
        f"{name} was a small robot who lived in {place}. One night, {name} needed {thing}. "
        f'"Beep," said {name}. "Where can it be?" Then {name} met {helper}. '
        f'"Have you seen {thing}?" asked {name}. "Look behind you," said {helper}. '
        f"And there it was! {name} was happy and danced around {place}. "
        f"From then on, the robot knew {lesson}."
    )


stories = [write_story(number) for number in range(400)]
Path("my_stories.txt").write_text("\n<|endoftext|>\n".join(stories), encoding="utf-8")
print(stories[0])

# %% [markdown]
# ## Before the training
#
# The loss on fifty new robot stories and on fifty new stories of the course, and the model's idea of a robot
# story:

# %%
from tinystories_slm import grammar
from tinystories_slm.data.tokenizer import encode_stories
from tinystories_slm.evaluation.likelihood import score_stories
from tinystories_slm.generation import generate_texts

tests = {
    "your stories": [write_story(number) for number in range(1000, 1050)],
    "stories of the course": list(grammar.generate_corpus(50, seed=1)),
}


def measure_losses(model):
    """Return the loss in nats per token on each set of `tests`."""
    losses = {}
    for name, texts in tests.items():
        scores = score_stories(
            model, encode_stories(tokenizer, texts), eos_token_id=tokenizer.eos_token_id, batch_size=16
        )
        losses[name] = scores.nats.sum() / scores.num_tokens.sum()
    return losses


before = measure_losses(model)
prompt = "Bip was a small robot who"
print(generate_texts(model, tokenizer, [prompt], temperature=0.5, max_new_tokens=80, seed=0)[0])

# %% [markdown]
# ## Fine-tuning
#
# `model.init_from` takes the weights, and `tokenizer.pretrained` the tokenizer: the numbers of the tokens
# must stay the same. The learning rate is lower than in the first training, so that less is forgotten.
# `train.resume never` starts again when you run this cell again, for example after a change of the stories.

# %%
logging.getLogger("tinystories_slm").setLevel(logging.WARNING)
flags = (
    "--config configs/course.yaml --output_dir runs/own --train.resume never "
    "--data.source my_stories.txt --data.data_dir data/own "
    "--model.init_from runs/course/best --tokenizer.pretrained runs/course/best "
    "--train.max_steps 60 --train.warmup_steps 10 --train.lr 1e-3"
)
own_dir = train(parse_config(flags.split()))
own_model = AutoModelForCausalLM.from_pretrained(own_dir / "last")

# %% [markdown]
# ## After the training

# %%
for text in generate_texts(own_model, tokenizer, [prompt] * 2, temperature=0.5, max_new_tokens=120, seed=0):
    print(text, end="\n\n")

# %%
after = measure_losses(own_model)
figure, axes = plt.subplots(figsize=(5.5, 3))
for offset, (label, losses) in enumerate({"before": before, "after": after}.items()):
    bars = axes.bar([x + 0.4 * offset for x in range(2)], losses.values(), width=0.36, label=label)
    axes.bar_label(bars, fmt="%.2f")
axes.set_xticks([0.2, 1.2], tests)
axes.set(ylabel="nats per token")
axes.margins(y=0.12)
axes.legend()
plt.show()

# %% [markdown]
# The loss on the new stories falls, and on the stories of the course it rises: the model forgets what it no
# longer reads. A mixture of both kinds prevents this ([docs/data.md](../docs/data.md)).
#
# ## Exercise 1
#
# Write a template of your own: a function from a number to a story. Different numbers should give different
# stories, the same number always the same story, and each story must fit into the model's context of 256
# tokens.


# %% tags=["exercise"]
def write_own_story(number):
    return ""  # your code


# %% tags=["check"]
own_stories = [write_own_story(number) for number in range(50)]
lengths = [len(tokenizer(text).input_ids) for text in own_stories]
is_right = (
    len(set(own_stories)) > 10
    and own_stories == [write_own_story(number) for number in range(50)]
    and 20 < min(lengths) <= max(lengths) <= model.config.max_position_embeddings
)
print("Exercise 1:", "correct" if is_right else "not yet")

# %% [markdown]
# ## Exercise 2
#
# How much did the model forget? Compute by how many **percent** its perplexity (the exponential of the loss)
# rose on the stories of the course. Use `before` and `after`.

# %% tags=["exercise"]
rise_in_percent = 0.0  # your code

# %% tags=["check"]
from math import exp

old, new = (exp(losses["stories of the course"]) for losses in (before, after))
print("Exercise 2:", "correct" if abs(rise_in_percent / 100 - (new - old) / old) < 1e-4 else "not yet")

# %% [markdown]
# ## What next?
#
# - Real stories: `--data.source tinystories` trains on [TinyStories](https://arxiv.org/abs/2305.07759), and
#   [docs/data.md](../docs/data.md) lists more.
# - A better model: [docs/presets.md](../docs/presets.md). `configs/quickstart.yaml` takes three minutes.
# - Share it: [docs/hub.md](../docs/hub.md).

# %% [markdown]
# # 3. The loss, and the lowest loss there can be
#
# The **loss** measures how well a model predicts. For most texts, the best possible loss is unknown. Here it
# is known: a grammar wrote the stories, and it gives the exact probability of each. This notebook computes
# both.

# %% [markdown]
# ## The loss of one story
#
# The model returns one number for each token of the vocabulary, the **logits**. The softmax turns them into
# probabilities. The loss of a token is minus the logarithm of the probability that the model gave to the
# token that came. A certain prediction that comes true costs 0. One token of probability 1/2 costs ln 2 =
# 0.69 **nats**.

# %%
from tinystories_slm import grammar

story = grammar.generate_story(seed=1, index=1).text
ids = tokenizer(story, return_tensors="pt").input_ids[0]  # <|endoftext|> and the story
targets = torch.cat([ids[1:], ids[:1]])  # the token after each: the story and <|endoftext|>

with torch.no_grad():
    logits = model(ids[None]).logits[0]  # (T, vocabulary)
probabilities = logits.softmax(dim=-1)
nats = -probabilities[torch.arange(len(targets)), targets].log()
print(f"{len(nats)} tokens, {nats.sum():.1f} nats in total, loss {nats.mean():.3f} nats per token")
print(f"perplexity {nats.mean().exp():.2f}: as uncertain as an equal choice among this many tokens")

# %% [markdown]
# `score_stories` of the package does this for many stories:

# %%
from tinystories_slm.data.tokenizer import encode_stories
from tinystories_slm.evaluation.likelihood import score_stories

held_out = list(grammar.generate_corpus(200, seed=1))
scores = score_stories(
    model, encode_stories(tokenizer, held_out), eos_token_id=tokenizer.eos_token_id, batch_size=16
)
loss = scores.nats.sum() / scores.num_tokens.sum()
print(f"story 1: {scores.nats[1]:.1f} nats; 200 stories: {loss:.4f} nats per token")
torch.testing.assert_close(float(nats.sum()), scores.nats[1], rtol=1e-4, atol=0)

# %% [markdown]
# ## Where is the loss?
#
# Most tokens cost almost nothing: they follow from those before. A few cost much. These are the places where
# the story could have gone on in another way.

# %%
shown = slice(0, 48)
labels = [tokenizer.decode([token]) for token in targets[shown]]
figure, axes = plt.subplots(figsize=(8, 3))
axes.bar(range(len(labels)), nats[shown])
axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
axes.set(ylabel="nats", xlim=(-0.7, len(labels) - 0.3))
axes.grid(axis="y", alpha=0.3)
plt.show()

# %% [markdown]
# ## The floor
#
# The grammar chooses with equal probability among the options at each place: 5 ways to open a story, then an
# adjective, then a hero, and so on. The probability of a story is the product of these choices, and
# `log_prob` returns its logarithm. The mean of minus this logarithm over all stories is the **entropy** of
# the corpus ([Shannon, 1948](https://doi.org/10.1002/j.1538-7305.1948.tb01338.x)).
#
# For every model,
#
# > mean loss of the model = entropy + a difference that is never negative,
#
# and the difference (the Kullback-Leibler divergence) is 0 only for a model that gives each story its exact
# probability. A single story may cost the model less than the grammar; the mean over all stories cannot.

# %%
floor = [-grammar.log_prob(text) for text in held_out]
print(f"entropy of the corpus:   {grammar.entropy():6.2f} nats per story")
print(f"these stories, grammar:  {sum(floor) / len(floor):6.2f} nats per story")
print(f"these stories, model:    {scores.nats.mean():6.2f} nats per story")

tokens_per_story = scores.num_tokens.mean()
print(f"floor {grammar.entropy() / tokens_per_story:.4f}, model {loss:.4f} nats per token")

# %%
differences = scores.nats - torch.tensor(floor).numpy()
figure, axes = plt.subplots(figsize=(6, 3))
axes.hist(differences, bins=30)
axes.axvline(0, color="black", linestyle="--", label="as good as the grammar")
axes.axvline(differences.mean(), color="tab:orange", label="mean")
axes.set(xlabel="nats of a story: model minus grammar", ylabel="stories")
axes.legend()
plt.show()

# %% [markdown]
# The mean difference is what the model could still learn. A longer run comes closer:
# `configs/quickstart.yaml` has one more layer and trains twice as many steps.
#
# ## A story that the grammar rejects
#
# We change the last place of the hero's name. The grammar finds the contradiction, and the model pays for it.

# %%
import re

name = re.search(r"named (\w+)\.", story)[1]
other = "Max" if name != "Max" else "Tom"
before, _, after = story.rpartition(name)
broken = before + other + after

diagnosis = grammar.diagnose(broken)
print(f"{broken[diagnosis.position :][:60]!r}: {diagnosis.constraint}")

both = score_stories(
    model, encode_stories(tokenizer, [story, broken]), eos_token_id=tokenizer.eos_token_id, batch_size=2
)
print(f"the story {both.nats[0]:.1f} nats, with another name {both.nats[1]:.1f} nats")

# %% [markdown]
# ## Exercise 1
#
# A model gave the tokens of a text these probabilities. Write a function that returns the loss in nats per
# token.

# %% tags=["exercise"]
import math


def mean_loss(probabilities):
    return 0.0  # your code


# %% tags=["check"]
is_right = abs(mean_loss([0.5, 0.25, 1.0]) - math.log(2)) < 1e-9 and mean_loss([1.0]) == 0
print("Exercise 1:", "correct" if is_right else "not yet")

# %% [markdown]
# ## Exercise 2
#
# Nats per token depend on the tokenizer: longer tokens cost more each. To compare models with different
# tokenizers, divide by bytes. Write a function that returns **bits per byte** (1 bit = ln 2 nats).


# %% tags=["exercise"]
def bits_per_byte(total_nats, texts):
    return 0.0  # your code


# %% tags=["check"]
from tinystories_slm.evaluation.likelihood import metrics_from_sums

num_bytes = sum(len(text.encode()) for text in held_out)
metrics = metrics_from_sums(
    nats=scores.nats.sum(), num_correct=0, num_tokens=1, num_bytes=num_bytes, num_stories=len(held_out)
)
is_right = abs(bits_per_byte(scores.nats.sum(), held_out) - metrics["bits_per_byte"]) < 1e-9
print("Exercise 2:", "correct" if is_right else "not yet")

# %% [markdown]
# Next: [how training lowers the loss](4_training.ipynb).

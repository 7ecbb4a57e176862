# %% [markdown]
# # 5. Sampling: from probabilities to a story
#
# The model gives each token of the vocabulary a probability. A story needs one token. Which one? This
# notebook compares the usual rules, and measures what each does to quality and variety.

# %% [markdown]
# ## The next token
#
# The model's ten most probable tokens after a prompt, at three **temperatures**. The logits are divided by
# the temperature before the softmax: below 1, probable tokens become more probable; above 1, rare ones gain.

# %%
prompt = "Once upon a time, there was a"
inputs = tokenizer(prompt, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits[0, -1]  # (vocabulary,)

top = logits.topk(10).indices
figure, axes = plt.subplots(figsize=(8, 3))
for offset, temperature in enumerate((0.3, 1.0, 3.0)):
    probabilities = (logits / temperature).softmax(dim=-1)[top]
    axes.bar(
        [x + 0.27 * offset for x in range(10)], probabilities, width=0.25, label=f"temperature {temperature}"
    )
axes.set_xticks([x + 0.27 for x in range(10)], [tokenizer.decode([token]) for token in top])
axes.set(ylabel="probability")
axes.legend()
plt.show()

# %% [markdown]
# The grammar chooses its adjectives with equal probability, and has more than ten. The model has learned that
# they are about equally probable.
#
# ## A story, token by token
#
# Predict, draw a token, append it, repeat, until the model draws `<|endoftext|>`.

# %%
from itertools import count


@torch.no_grad()
def write_story(prompt, choose, seed):
    """Continue `prompt`; `choose` turns logits into probabilities."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    for _ in count():
        probabilities = choose(model(ids).logits[0, -1])
        token = torch.multinomial(probabilities, 1, generator=generator)
        if token == tokenizer.eos_token_id or ids.shape[1] == model.config.max_position_embeddings:
            return tokenizer.decode(ids[0], skip_special_tokens=True)
        ids = torch.cat([ids, token[None]], dim=1)


print(write_story(prompt, lambda logits: (logits / 0.5).softmax(dim=-1), seed=0))

# %% [markdown]
# `generate_texts` of the package does the same, keeps keys and values of earlier tokens instead of computing
# them again, and writes many stories at a time. So does `model.generate` of transformers.
#
# ## Cutting the tail
#
# The vocabulary has 2,048 tokens. Most are wrong at any place, and have a tiny probability each. Together
# they are drawn often enough to spoil a story of 200 tokens. Two rules remove them:
#
# - **top-k** ([Fan et al., 2018](https://arxiv.org/abs/1805.04833)) keeps the k most probable tokens;
# - **top-p** ([Holtzman et al., 2019](https://arxiv.org/abs/1904.09751)) keeps the most probable tokens
#   that together have at least the probability p. It keeps few tokens where the model is certain, and many
#   where it is not.


# %%
def top_k(probabilities, k):
    """Keep the `k` largest of `probabilities`, scaled to a sum of 1."""
    smallest = probabilities.topk(k).values[-1]
    kept = probabilities.masked_fill(probabilities < smallest, 0.0)
    return kept / kept.sum()


probabilities = logits.softmax(dim=-1)
print(f"probability outside of the 50 most probable tokens: {1 - probabilities.topk(50).values.sum():.4f}")
print(f"top-k keeps {int((top_k(probabilities, 50) > 0).sum())} tokens")

# %% [markdown]
# ## Quality and variety
#
# A low temperature repeats the same safe stories; a high one makes mistakes. The grammar is an exact judge:
# `diagnose` returns the place where a text leaves the grammar. We measure, at each temperature,
#
# - quality: the share of a story before its first mistake, and
# - variety: the share of three-word sequences that occur once among all stories.

# %%
from collections import Counter

from tinystories_slm import grammar
from tinystories_slm.generation import generate_texts


def share_before_mistake(story):
    position = grammar.diagnose(story).position
    return 1.0 if position is None else position / len(story)


def share_of_rare_trigrams(stories):
    trigrams = Counter(
        trigram
        for words in map(str.split, stories)
        for trigram in zip(words, words[1:], words[2:], strict=False)
    )
    return sum(number == 1 for number in trigrams.values()) / sum(trigrams.values())


temperatures = [0.1, 0.4, 0.7, 1.0, 1.3]
quality, variety = [], []
for temperature in temperatures:
    stories = generate_texts(
        model, tokenizer, ["Once upon a time"] * 32, temperature=temperature, top_k=0, top_p=1.0, seed=0
    )
    quality.append(sum(map(share_before_mistake, stories)) / len(stories))
    variety.append(share_of_rare_trigrams(stories))

figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(temperatures, quality, "o-", label="quality: share before the first mistake")
axes.plot(temperatures, variety, "s-", label="variety: share of rare trigrams")
axes.set(xlabel="temperature", ylim=(0, 1))
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %% [markdown]
# No temperature is best at both.
#
# ## Exercise 1
#
# Write top-p: keep the most probable tokens up to and including the one with which their sum reaches `p`, set
# all others to 0, and scale the sum to 1. Hint: `sort` and `cumsum`.


# %% tags=["exercise"]
def top_p(probabilities, p):
    return probabilities  # your code


# %% tags=["check"]
example = torch.tensor([0.1, 0.5, 0.15, 0.25])
expected = {
    0.4: [0.0, 1.0, 0.0, 0.0],
    0.6: [0.0, 2 / 3, 0.0, 1 / 3],
    0.85: [0.0, 5 / 9, 1 / 6, 5 / 18],
    1.0: example.tolist(),
}
is_right = all(torch.allclose(top_p(example, p), torch.tensor(kept)) for p, kept in expected.items())
print("Exercise 1:", "correct" if is_right else "not yet")

# %% [markdown]
# ## Exercise 2
#
# How uncertain is the model? Write the **entropy** of probabilities in nats: minus the sum of p ln p, where a
# probability of 0 adds 0. Then plot it over a story, if you like: where is the model certain?


# %% tags=["exercise"]
def entropy(probabilities):
    return 0.0  # your code


# %% tags=["check"]
is_right = abs(float(entropy(torch.tensor([0.25] * 4))) - 1.3863) < 1e-4
is_right = is_right and float(entropy(torch.tensor([1.0, 0.0]))) == 0
is_right = is_right and abs(float(entropy(torch.tensor([0.5, 0.25, 0.25]))) - 1.0397) < 1e-4
print("Exercise 2:", "correct" if is_right else "not yet")

# %% [markdown]
# Next: [what a single neuron does](6_neurons.ipynb).

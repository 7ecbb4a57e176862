# %% [markdown]
# # 1. A story becomes tokens
#
# A language model reads and writes numbers, not letters. A **tokenizer** cuts a text into pieces, the
# **tokens**, and gives each piece a number. This notebook shows how it cuts, and how it learned to.

# %% [markdown]
# ## A story
#
# The package has a grammar that writes small stories. The model of this course was trained on 7,600 of them.
# `seed=1` selects stories that it has not seen: training used `seed=0`.

# %%
from tinystories_slm import grammar

story = grammar.generate_story(seed=1, index=0).text
print(story)

# %% [markdown]
# ## Its tokens
#
# A bar separates two tokens. A token holds the blank before its word, so that no token is needed for blanks
# alone. Common words are one token. Rare words are several.

# %%
ids = tokenizer(story, add_special_tokens=False).input_ids
print("|".join(tokenizer.decode([token]) for token in ids[:90]))

# %%
print(f"{len(story)} characters, {len(story.encode())} bytes, {len(ids)} tokens")
print("the first ten numbers:", ids[:10])
print("the same story again:", tokenizer.decode(ids) == story)

# %% [markdown]
# In training, every story follows the token `<|endoftext|>`, which has the number 0. It marks where a story
# ends and the next one starts. The tokenizer adds it to the front of each text unless
# `add_special_tokens=False`.

# %%
print(tokenizer.convert_ids_to_tokens(tokenizer("Once upon a time").input_ids))

# %% [markdown]
# `Ġ` stands for a blank. The tokenizer works on **bytes**: every text of every language is a sequence of
# bytes, and each of the 256 bytes is in the vocabulary. So it can read any text, even letters that no story
# contains.

# %%
for text in ("the fox", "xylophone", "Zoë", "狐"):
    tokens = tokenizer.tokenize(text)
    print(f"{text:10} {len(text.encode()):2} bytes, {len(tokens)} tokens: {tokens}")

# %% [markdown]
# ## How the tokenizer learned its pieces
#
# **Byte-pair encoding** ([Sennrich et al., 2016](https://arxiv.org/abs/1508.07909)) starts with single bytes.
# It counts which two neighbors occur together most often, merges this pair into a new token, and repeats.
# Pairs do not cross the border of a word. This is all of it:

# %%
from collections import Counter
from itertools import pairwise


def count_pairs(words):
    """Count the pairs of neighboring tokens in `words`, a Counter of tuples of tokens."""
    pairs = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            pairs[pair] += count
    return pairs


def merge(word, pair):
    """Replace each occurrence of `pair` in `word` by one token."""
    merged = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] = "".join(pair)
        else:
            merged.append(token)
    return tuple(merged)


def train_by_hand(words, num_merges):
    """Return the merges of byte-pair encoding, in the order in which they are learned."""
    merges = []
    for _ in range(num_merges):
        pair, _count = count_pairs(words).most_common(1)[0]
        words = Counter({merge(word, pair): count for word, count in words.items()})
        merges.append(pair)
    return merges


# %%
from tinystories_slm.data.tokenizer import train_bpe

stories = list(grammar.generate_corpus(300, seed=1))
first_words = train_bpe(stories, vocab_size=258)  # cuts texts into words, as the real tokenizer does
words = Counter(
    tuple(word) for text in stories for word, _ in first_words.pre_tokenizer.pre_tokenize_str(text)
)
merges = train_by_hand(words, num_merges=20)
print(" ".join("".join(pair) for pair in merges))

# %% [markdown]
# The package learns the same merges, only faster:

# %%
import json

learned = json.loads(train_bpe(stories, vocab_size=257 + 20).to_str())["model"]["merges"]
assert [tuple(pair) for pair in learned] == merges
print("equal")

# %% [markdown]
# ## How many tokens should there be?
#
# A larger vocabulary needs fewer tokens for the same story, so the model reads a story in fewer steps. But
# each token needs a row of the embedding matrix, and a rare token is seen too seldom to be learned well.

# %%
sizes = [260, 400, 600, 1000, 1500, 2000]
bytes_per_token = []
for size in sizes:
    bpe = train_bpe(stories, vocab_size=size)
    num_tokens = sum(len(encoding.ids) for encoding in bpe.encode_batch(stories))
    bytes_per_token.append(sum(len(text.encode()) for text in stories) / num_tokens)

figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(sizes, bytes_per_token, "o-")
axes.set(xlabel="vocabulary size", ylabel="bytes per token", ylim=(0, None))
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Exercise 1
#
# Write a function that returns the number of bytes per token of a text under the `tokenizer` of the course.
# Count neither `<|endoftext|>` nor characters: `"Zoë"` has 3 characters and 4 bytes.


# %% tags=["exercise"]
def measure_bytes_per_token(text):
    return 1.0  # your code


# %% tags=["check"]
expected = {" the fox": 8 / 2, "狐": 1.0, "Once upon a time": 16 / 4}
is_right = all(abs(measure_bytes_per_token(text) - value) < 1e-6 for text, value in expected.items())
print("Exercise 1:", "correct" if is_right else "not yet")

# %% [markdown]
# ## Exercise 2
#
# Find a text of one character that this tokenizer cuts into four tokens. (No character has more than four
# bytes.)

# %% tags=["exercise"]
character = "a"  # your answer

# %% tags=["check"]
num_tokens = len(tokenizer.tokenize(character))
print("Exercise 2:", "correct" if (len(character), num_tokens) == (1, 4) else "not yet")

# %% [markdown]
# Next: [how a token looks at the tokens before it](2_attention.ipynb).

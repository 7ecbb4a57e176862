# %% [markdown]
# # 6. Taking a neuron apart
#
# Half of a layer is attention. The other half, the **feed-forward** part, works on each token alone. It has
# 352 **neurons**: numbers that are computed from the token's vector and that then add to it. This notebook
# finds a neuron that reacts to something, and measures what the model loses without it.

# %% [markdown]
# ## Reading the neurons
#
# In this model, a neuron is `silu(gate) * up` ([Shazeer, 2020](https://arxiv.org/abs/2002.05202)): the
# product of two projections of the token's vector. `down_proj` multiplies each neuron by a vector of its own
# and adds all of them to the token's vector. A hook on `down_proj` reads its input, the neurons.

# %%
from tinystories_slm import grammar

mlp = model.model.layers[1].mlp
stories = [tokenizer(text).input_ids for text in grammar.generate_corpus(150, seed=1)]


@torch.no_grad()
def read_neurons(ids):
    """Return the neurons of layer 1 at each token, (T, 352)."""
    read = []
    hook = mlp.down_proj.register_forward_hook(lambda module, args, output: read.append(args[0][0]))
    model(torch.tensor([ids]))
    hook.remove()
    return read[0]


neurons = torch.cat([read_neurons(ids) for ids in stories])  # (tokens of all stories, 352)
print(tuple(neurons.shape))

# %% [markdown]
# ## What goes with a neuron?
#
# Layer 1 is the last one, so its neurons should say what comes next. For each neuron and each of the 50 most
# frequent tokens, we compute the **correlation** between the neuron and the answer to "is this the next
# token?" (1 or 0). It is 1 if both rise and fall together, and 0 if they have nothing to do with each other.

# %%
next_tokens = torch.tensor([token for ids in stories for token in [*ids[1:], tokenizer.eos_token_id]])
frequent = next_tokens.bincount().topk(50).indices
is_next = (next_tokens[:, None] == frequent).float()  # (tokens of all stories, 50)


def standardize(columns):
    """Scale each column to mean 0 and variance 1."""
    return (columns - columns.mean(0)) / columns.std(0)


correlations = standardize(neurons).T @ standardize(is_next) / len(neurons)  # (352, 50)
neuron, column = divmod(int(correlations.abs().argmax()), 50)
token, sign = int(frequent[column]), float(correlations[neuron, column].sign())
print(f"neuron {neuron} and {tokenizer.decode([token])!r}: correlation {correlations[neuron, column]:.2f}")

figure, axes = plt.subplots(figsize=(6, 2.6))
axes.hist(correlations.flatten(), bins=80, log=True)
axes.set(xlabel="correlation", ylabel="pairs (logarithmic)")
plt.show()

# %% [markdown]
# Some pair always has the largest correlation. Among as many pairs of independent random numbers it would be
# about 0.02. Here is the neuron over a story. The gray lines are the places where its token comes next.

# %%
ids = stories[3]
values = read_neurons(ids)[:, neuron]
figure, axes = plt.subplots(figsize=(8, 2.8))
for place, following in enumerate(ids[1:]):
    if following == token:
        axes.axvline(place, color="gray", alpha=0.4, linewidth=3)
axes.bar(range(len(ids)), values, width=1.0)
axes.set(xlabel="token", ylabel=f"neuron {neuron}", xlim=(-0.5, len(ids) - 0.5))
plt.show()

# %% [markdown]
# ## What the neuron writes
#
# The neuron adds its vector, a column of `down_proj`, to the token's vector. Nothing follows but the last
# norm and the matrix that makes the logits. So the product of the column and that matrix shows which tokens
# the neuron makes more probable when it is positive, and which less ([Geva et al.,
# 2021](https://arxiv.org/abs/2012.14913)). The norm's scale differs from token to token and is left out.

# %%
with torch.no_grad():
    effect = model.lm_head.weight @ (
        model.model.norm.weight * mlp.down_proj.weight[:, neuron]
    )  # (vocabulary,)
effect *= sign  # of the values that the neuron has before its token
for word, order in (("more", effect), ("less", -effect)):
    print(f"{word} probable:", [tokenizer.decode([index]) for index in order.topk(8).indices])

# %% [markdown]
# ## Without the neuron
#
# Correlation is not cause. To see what the neuron does, we remove it: a hook sets it to 0 (**ablation**).
# Then we compare the loss of every token with and without it. For scale, we do the same to twenty other
# neurons.


# %%
@torch.no_grad()
def token_losses(stories, ablated=None, value=0.0):
    """Return the loss of each token, in nats, with the neuron `ablated` set to `value`."""

    def replace(module, args):
        if ablated is not None:
            args[0][..., ablated] = value
        return args

    hook = mlp.down_proj.register_forward_pre_hook(replace)
    losses = []
    for ids in stories:
        targets = torch.tensor([*ids[1:], tokenizer.eos_token_id])
        logits = model(torch.tensor([ids])).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    hook.remove()
    return torch.cat(losses)


few = stories[:40]
normal = token_losses(few)
rise = token_losses(few, neuron) - normal
others = [token_losses(few, other).mean() - normal.mean() for other in range(0, 352, 18)]
print(f"loss {normal.mean():.4f}, without neuron {neuron} {normal.mean() + rise.mean():.4f} nats per token")
print(
    f"rank of the rise among {len(others)} other neurons: {sum(other > rise.mean() for other in others) + 1}"
)

# %% [markdown]
# Which tokens become harder to predict? The mean rise for each token that occurs at least ten times:

# %%
targets = next_tokens[: len(rise)]
counts = targets.bincount(minlength=model.config.vocab_size)
mean_rise = targets.bincount(weights=rise, minlength=model.config.vocab_size) / counts.clamp(min=1)
mean_rise[counts < 10] = -torch.inf
top = mean_rise.topk(10).indices

figure, axes = plt.subplots(figsize=(6, 3))
axes.barh([repr(tokenizer.decode([index])) for index in top.flip(0)], mean_rise[top].flip(0))
axes.set(xlabel="rise of the loss without the neuron (nats)")
axes.grid(axis="x", alpha=0.3)
plt.show()

# %% [markdown]
# A single neuron often has several meanings, and one meaning is often spread over several neurons. The next
# notebook looks for better units.
#
# ## Exercise 1
#
# Write the correlation of two vectors: subtract from each its mean, then divide the sum of their products by
# the square root of the product of their sums of squares.


# %% tags=["exercise"]
def correlation(a, b):
    return 0.0  # your code


# %% tags=["check"]
pairs = [(neurons[:, index], is_next[:, column]) for index in (0, neuron)]
is_right = all(
    abs(float(correlation(a, b) - torch.corrcoef(torch.stack([a, b]))[0, 1])) < 1e-4 for a, b in pairs
)
print("Exercise 1:", "correct" if is_right else "not yet")

# %% [markdown]
# ## Exercise 2
#
# Zero may be a value that the neuron never has. A milder ablation sets it to its mean over all tokens, so
# that only its changes are lost. Set `value` to that mean, and compare the loss with that above.

# %% tags=["exercise"]
value = 0.0  # your code: use neurons[:, neuron]

# %% tags=["check"]
loss = token_losses(few, neuron, value=value).mean()
print(f"loss {loss:.4f} nats per token")
is_right = abs(float(value) - float(neurons.double().mean(0)[neuron])) < 1e-4
print("Exercise 2:", "correct" if is_right else "not yet")

# %% [markdown]
# Next: [a sparse autoencoder finds better units](7_autoencoder.ipynb).

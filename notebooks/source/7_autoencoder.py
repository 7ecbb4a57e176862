# %% [markdown]
# # 7. A sparse autoencoder
#
# The vector of a token has 128 numbers, but the model represents many more than 128 things in it. Each number
# therefore means several things. A **sparse autoencoder** ([Bricken et al.,
# 2023](https://transformer-circuits.pub/2023/monosemantic-features); [Cunningham et al.,
# 2023](https://arxiv.org/abs/2309.08600)) describes the vector as a sum of a few out of many **features**, in
# the hope that each feature means one thing.

# %% [markdown]
# ## The vectors
#
# The vectors after the first layer, at every token of 300 stories.

# %%
from tinystories_slm import grammar

stories = [tokenizer(text).input_ids for text in grammar.generate_corpus(300, seed=1)]


@torch.no_grad()
def read_vectors(ids):
    """Return the vector of each token after the first layer, (T, 128)."""
    return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]


vectors = torch.cat([read_vectors(ids) for ids in stories])
tokens = torch.tensor([token for ids in stories for token in ids])
center, scale = vectors.mean(0), vectors.std()
x_all = (vectors - center) / scale  # (tokens of all stories, 128)
print(tuple(x_all.shape))

# %% [markdown]
# ## The autoencoder
#
# The encoder computes 512 features. Only the 16 largest of a token stay, the others become 0. The decoder
# multiplies each by a vector of its own and adds them up. The loss is the squared error of the sum. The first
# autoencoders kept all features and added a penalty on their size to the loss; keeping the largest (**TopK**,
# [Gao et al., 2024](https://arxiv.org/abs/2406.04093)) needs no penalty, which makes features smaller than
# they should be.


# %%
class SparseAutoencoder(torch.nn.Module):
    def __init__(self, width, num_features, num_active):
        super().__init__()
        self.num_active = num_active
        self.encoder = torch.nn.Linear(width, num_features)
        self.decoder = torch.nn.Linear(num_features, width)
        with torch.no_grad():  # start with features that read what they write
            self.decoder.weight.div_(self.decoder.weight.norm(dim=0))
            self.encoder.weight.copy_(self.decoder.weight.T)
            self.encoder.bias.zero_()
            self.decoder.bias.zero_()

    def forward(self, x):
        values, indices = self.encoder(x).topk(self.num_active, dim=-1)
        features = torch.zeros(*x.shape[:-1], self.encoder.out_features).scatter(-1, indices, values.relu())
        return self.decoder(features), features


torch.manual_seed(0)
autoencoder = SparseAutoencoder(width=128, num_features=512, num_active=16)
optimizer = torch.optim.Adam(autoencoder.parameters(), lr=2e-3)
num_steps, history = 1500, []
for step in range(num_steps):
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / num_steps)
    x = x_all[torch.randint(len(x_all), (512,))]
    error = (x - autoencoder(x)[0]).pow(2).sum(-1).mean()
    error.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 25 == 0:
        history.append((step, 1 - error.item() / x.pow(2).sum(-1).mean().item()))

# %%
figure, axes = plt.subplots(figsize=(6, 2.8))
axes.plot(*zip(*history, strict=True))
axes.set(xlabel="step", ylabel="explained share of the variance", ylim=(0, 1))
axes.grid(alpha=0.3)
plt.show()

with torch.no_grad():
    all_features = autoencoder(x_all)[1]  # (tokens of all stories, 512)
is_dead = (all_features > 0).sum(0) == 0
print(f"{int(is_dead.sum())} of 512 features are never active")

# %% [markdown]
# ## Does the model still work?
#
# We replace the vectors after the first layer by the autoencoder's output and measure the loss. For
# comparison, we replace them by zeros, which removes all that they say.


# %%
@torch.no_grad()
def loss_with(replace):
    """Return the loss in nats per token, with `replace` applied to the vectors after the first layer."""
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: replace(output))
    losses = []
    for ids in stories[:40]:
        targets = torch.tensor([*ids[1:], tokenizer.eos_token_id])
        losses.append(torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0], targets))
    hook.remove()
    return float(torch.stack(losses).mean())


normal = loss_with(lambda x: x)
replaced = loss_with(lambda x: autoencoder((x - center) / scale)[0] * scale + center)
removed = loss_with(torch.zeros_like)
print(f"loss {normal:.2f}, with the autoencoder {replaced:.2f}, with zeros {removed:.2f} nats per token")
print(
    f"the autoencoder keeps {(removed - replaced) / (removed - normal):.0%} of what the vectors are good for"
)

# %% [markdown]
# ## Does a feature mean one thing?
#
# For each of the 100 most frequent tokens, we look for the feature that best goes with it: the largest
# correlation with "this is the token". We do the same with the 128 numbers of the vector. Above the dashed
# line, the feature is better.


# %%
def best_correlations(units, concepts):
    """Return for each column of `concepts` (N, K) the best absolute correlation with a column of `units`."""
    units, concepts = ((columns - columns.mean(0)) / columns.std(0) for columns in (units, concepts))
    return (units.T @ concepts / len(units)).abs().amax(dim=0)  # (K,)


frequent = tokens.bincount().topk(100).indices
is_token = (tokens[:, None] == frequent).float()  # (tokens of all stories, 100)
numbers = best_correlations(x_all, is_token)
features = best_correlations(all_features[:, ~is_dead], is_token)
print(f"mean of the best number {numbers.mean():.2f}, of the best feature {features.mean():.2f}")

figure, axes = plt.subplots(figsize=(4.2, 4))
axes.scatter(numbers, features, s=12)
axes.plot([0, 1], [0, 1], "--", color="black")
axes.set(xlabel="best number of the vector", ylabel="best feature", xlim=(0, 1), ylim=(0, 1))
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## Look at features
#
# Where is a feature active? We take three features that are active at 0.5% to 5% of the tokens, and print the
# texts before the places where each is largest, one for each story.

# %%
story_of = torch.tensor([number for number, ids in enumerate(stories) for _ in ids])


def show(feature, num_texts=5):
    seen = set()
    for place in all_features[:, feature].argsort(descending=True).tolist():
        number = int(story_of[place])
        if number in seen:
            continue
        seen.add(number)
        first = max(0, place - 9)
        before = tokenizer.decode(tokens[first:place][story_of[first:place] == number])
        print(f"  {all_features[place, feature]:5.2f} {before!r} -> {tokenizer.decode([tokens[place]])!r}")
        if len(seen) == num_texts:
            return


share = (all_features > 0).float().mean(0)
for feature in ((share > 0.005) & (share < 0.05)).nonzero().flatten()[:3].tolist():
    print(f"feature {feature}, active at {share[feature]:.1%} of the tokens")
    show(feature)

# %% [markdown]
# This autoencoder fits on a screen. [SAELens](https://github.com/decoderesearch/SAELens) trains larger ones
# and other kinds; [docs/tools.md](../docs/tools.md) says how it loads a model of this package.
#
# ## Exercise 1
#
# Write a function that takes features `(N, F)` and returns the mean number of active features per row, called
# **L0**.


# %% tags=["exercise"]
def mean_active(features):
    return 0.0  # your code


# %% tags=["check"]
example = torch.tensor([[0.0, 2.0, 0.1], [0.0, 0.0, 3.0]])
is_right = abs(float(mean_active(example)) - 1.5) < 1e-6
print("Exercise 1:", "correct" if is_right else "not yet")

# %% [markdown]
# ## Exercise 2
#
# Write the loss with a penalty: the squared error of each row of `output`, summed over its numbers, plus
# `penalty` times the sum of the row's features; then the mean over the rows. If you like, train with it: keep
# all features that are positive, and find a `penalty` that leaves about 16 of them.


# %% tags=["exercise"]
def penalized_loss(x, output, features, penalty):
    return (x - output).pow(2).sum(-1).mean()  # your code


# %% tags=["check"]
x, output = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
features = torch.tensor([[0.5, 1.5, 0.0], [0.0, 0.0, 2.0]])
is_right = (
    abs(float(penalized_loss(x, output, features, penalty=0.25)) - 3.0) < 1e-6
)  # (1 + 0.5 + 4 + 0.5) / 2
print("Exercise 2:", "correct" if is_right else "not yet")

# %% [markdown]
# Next: [your own stories](8_own_stories.ipynb).

# %% [markdown]
# Answers to the exercises of 2_attention.ipynb

# %%
def causal_softmax(scores):
    is_future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(is_future, -torch.inf).softmax(dim=-1)


# %%
def mean_distance(weights):
    positions = torch.arange(len(weights))
    distance = positions[:, None] - positions[None, :]  # negative where the weight is 0
    return (weights * distance).sum(-1).mean()

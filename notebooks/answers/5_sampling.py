# %% [markdown]
# Answers to the exercises of 5_sampling.ipynb

# %%
def top_p(probabilities, p):
    ordered, indices = probabilities.sort(descending=True)
    before = ordered.cumsum(dim=-1) - ordered  # probability of all more probable tokens
    ordered = ordered.masked_fill(before >= p - 1e-6, 0.0)
    kept = torch.zeros_like(probabilities).scatter(0, indices, ordered)
    return kept / kept.sum()


# %%
def entropy(probabilities):
    return -torch.xlogy(probabilities, probabilities).sum()

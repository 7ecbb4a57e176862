# %% [markdown]
# Answers to the exercises of 7_autoencoder.ipynb

# %%
def mean_active(features):
    return (features > 0).sum(-1).float().mean()


# %%
def penalized_loss(x, output, features, penalty):
    return ((x - output).pow(2).sum(-1) + penalty * features.sum(-1)).mean()

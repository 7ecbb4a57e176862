# %% [markdown]
# # 2. Attention by hand
#
# A model predicts the next token from all tokens before it. **Attention** is the part that moves information
# from earlier tokens to later ones ([Vaswani et al., 2017](https://arxiv.org/abs/1706.03762)). This notebook
# computes it step by step and compares every number with the model's own.

# %% [markdown]
# ## A text, and what the model says about it
#
# `eager` is the implementation that also returns the attention weights; the faster ones never store them.

# %%
text = "Once upon a time, there was a kind girl named Mia. She lived in a snug hut with her dad. One day, Mia"
inputs = tokenizer(text, return_tensors="pt")
labels = [tokenizer.decode([token]) for token in inputs.input_ids[0]]
T = len(labels)

model.set_attn_implementation("eager")
with torch.no_grad():
    outputs = model(**inputs, output_attentions=True)
print(
    model.config.num_hidden_layers, "layers,", model.config.num_attention_heads, "heads in each,", T, "tokens"
)

# %% [markdown]
# ## Step 1: query, key and value
#
# Every token starts as a row of the embedding matrix, `C` numbers. A norm rescales each row. Three matrices
# then make three vectors of it, split into `H` heads of `D` numbers:
#
# - the **query**: what this token looks for,
# - the **key**: what this token can be found by,
# - the **value**: what this token passes on.
#
# This model also rescales every query and key by a norm
# ([Henry et al., 2020](https://arxiv.org/abs/2010.04245)).

# %%
H, D = model.config.num_attention_heads, model.config.head_dim
layer = model.model.layers[0]


def split_heads(vectors):
    """(T, C) -> (H, T, D)"""
    return vectors.view(T, H, D).transpose(0, 1)


with torch.no_grad():
    x = layer.input_layernorm(model.model.embed_tokens(inputs.input_ids[0]))  # (T, C)
    query = layer.self_attn.q_norm(split_heads(layer.self_attn.q_proj(x)))
    key = layer.self_attn.k_norm(split_heads(layer.self_attn.k_proj(x)))
    value = split_heads(layer.self_attn.v_proj(x))
print("query, key and value have the shape", tuple(query.shape))

# %% [markdown]
# ## Step 2: positions
#
# So far, the order of the tokens plays no role. Rotary positions ([Su et al.,
# 2021](https://arxiv.org/abs/2104.09864)) rotate each query and key by an angle that grows with its position.
# The product of a query and a key then depends on the distance between the two.

# %%
from tinystories_slm.model.modeling_tinystories import apply_rotary_pos_emb, rope_cos_sin

cos, sin = rope_cos_sin(model.config, torch.arange(T)[None], x.dtype)
query = apply_rotary_pos_emb(query[None], cos, sin)[0]
key = apply_rotary_pos_emb(key[None], cos, sin)[0]

# %% [markdown]
# ## Step 3: scores, mask, weights
#
# The score of a pair is the product of the later token's query and the earlier token's key, divided by the
# square root of `D`. A token must not look at the tokens after it, or prediction would be copying: their
# scores become minus infinity. The **softmax** turns each row of scores into weights from 0 to 1 that add up
# to 1.

# %%
scores = query @ key.transpose(1, 2) / D**0.5  # (H, T, T)
is_future = torch.ones(T, T, dtype=torch.bool).triu(1)
weights = scores.masked_fill(is_future, -torch.inf).softmax(dim=-1)

print(f"largest difference from the model's weights: {(weights - outputs.attentions[0][0]).abs().max():.1e}")
torch.testing.assert_close(weights, outputs.attentions[0][0], atol=1e-5, rtol=0)

# %% [markdown]
# ## Step 4: the result
#
# Each token receives the mean of the values before it, weighted by its weights. A last matrix mixes the
# heads. A hook reads what the model computes at the same place.

# %%
read = {}
hook = layer.self_attn.register_forward_hook(lambda module, args, output: read.update(result=output[0]))
with torch.no_grad():
    by_hand = layer.self_attn.o_proj((weights @ value).transpose(0, 1).reshape(T, -1))
    model(**inputs)
hook.remove()
print(f"largest difference from the model's result: {(by_hand - read['result'][0]).abs().max():.1e}")
torch.testing.assert_close(by_hand, read["result"][0], atol=1e-4, rtol=0)

# %% [markdown]
# ## Where do the heads look?
#
# One picture for each head: a row for each token, a column for each token that it can look at. Dark is a
# large weight.

# %%
figure, grid = plt.subplots(2, H, figsize=(8, 4.4), layout="constrained")
for layer_index, row in enumerate(grid):
    for head, axes in enumerate(row):
        axes.imshow(outputs.attentions[layer_index][0, head], cmap="Blues", vmin=0, vmax=1)
        axes.set(title=f"layer {layer_index}, head {head}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# A dark line beside the diagonal is a head that looks at the token just before. A dark column is a head that
# looks at one token from everywhere, often the first.
#
# ## Which head finds "girl" or "boy"?
#
# After "a kind girl named Mia." comes "She", after "a brave boy named Tom." comes "He". At the full stop, the
# model has to know which. We measure how much each head looks from the full stop back to the token before
# "named", over 60 stories. The dashed line is what equal weights for all tokens would give.

# %%
from tinystories_slm import grammar

named, full_stop = tokenizer(" named.", add_special_tokens=False).input_ids
looks, equal_weights = [], []
for story in grammar.generate_corpus(60, seed=1):
    ids = tokenizer(story).input_ids
    kind, stop = ids.index(named) - 1, ids.index(full_stop)
    with torch.no_grad():
        attentions = model(torch.tensor([ids[: stop + 1]]), output_attentions=True).attentions
    looks.append(torch.cat(attentions)[:, :, stop, kind].flatten())  # (layers x H,)
    equal_weights.append(1 / (stop + 1))

share = torch.stack(looks).mean(0)
names = [f"{layer}.{head}" for layer in range(model.config.num_hidden_layers) for head in range(H)]
figure, axes = plt.subplots(figsize=(6, 3))
axes.bar(names, share)
axes.axhline(sum(equal_weights) / len(equal_weights), color="black", linestyle="--", label="equal weights")
axes.set(xlabel="layer.head", ylabel='weight on "girl" or "boy"')
axes.legend()
plt.show()

# %% [markdown]
# The best of these heads, on our text. Each row shows where a token looks.

# %%
best_layer, best_head = divmod(int(share.argmax()), H)
figure, axes = plt.subplots(figsize=(6.2, 5.6))
axes.imshow(outputs.attentions[best_layer][0, best_head], cmap="Blues", vmin=0, vmax=1)
axes.set_xticks(range(T), labels, rotation=90, fontsize=8)
axes.set_yticks(range(T), labels, fontsize=8)
axes.set(title=f"layer {best_layer}, head {best_head}", xlabel="looks at", ylabel="token")
plt.show()

# %% [markdown]
# Large weights show where a head looks, not what its value changes in the prediction. To find that out, one
# has to change the head and measure the loss, as [notebook 6](6_neurons.ipynb) does with a neuron.
#
# ## Exercise 1
#
# Write step 3 as a function: from scores `(T, T)` to weights, without looking at later tokens. The stub
# forgets the mask.


# %% tags=["exercise"]
def causal_softmax(scores):
    return scores.softmax(dim=-1)  # your code


# %% tags=["check"]
is_right = all(torch.allclose(causal_softmax(scores[head]), weights[head], atol=1e-5) for head in range(H))
print("Exercise 1:", "correct" if is_right else "not yet")

# %% [markdown]
# ## Exercise 2
#
# How far back does a head look? Write a function that takes weights `(T, T)` and returns the mean distance in
# tokens: for each token the sum of weight times distance, and the mean of that over all tokens.


# %% tags=["exercise"]
def mean_distance(weights):
    return 0.0  # your code


# %% tags=["check"]
example = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.1, 0.6, 0.3]])
is_right = abs(float(mean_distance(example)) - 0.35) < 1e-6  # (0 + 0.25 + 0.8) / 3
print("Exercise 2:", "correct" if is_right else "not yet")

# %% [markdown]
# Next: [how good is a prediction, and how good can it be?](3_loss.ipynb)

"""Number of parameters of any causal language model, with and without its embeddings."""

from torch import nn
from transformers import PreTrainedModel


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return the number of parameters, and the number without embeddings; tied matrices count once.

    Embeddings are the matrices of tokens and of positions, and the output head if it is a matrix of its own.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if (head := model.get_output_embeddings()) is not None:
        matrices.append(head.weight)
    return total, total - sum({id(matrix): matrix.numel() for matrix in matrices}.values())

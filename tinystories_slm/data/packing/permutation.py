"""Random permutations and draws that are functions of a key, without memory that grows with their size."""

import numpy as np

_ROUNDS = 8


def permute(numbers: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Apply the permutation of [0, size) that `key` selects to each of `numbers`.

    A Feistel network permutes the next power of four; a value outside [0, size) is permuted again until it
    is inside (cycle walking: Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

    Args:
        numbers: int64 (n,), each in [0, size).
        size: Length of the permutation; 1 or more.
        key: Integers of 0 or more.

    Returns:
        int64 (n,), each in [0, size).
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    values = numbers.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], np.uint64(half_bits), round_keys)
        outside = values >= size
    return values.astype(np.int64)


def draw(numbers: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Return a random 64-bit number for each of `numbers`, int64 (n,) of 0 or more: uint64 (n,)."""
    [round_key] = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return _mix(numbers.astype(np.uint64) ^ round_key)


def _feistel(values: np.ndarray, half_bits: np.uint64, round_keys: np.ndarray) -> np.ndarray:
    """Permute numbers of 2 `half_bits` bits, uint64 (n,)."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return (left << half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Mix the bits of uint64 numbers: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

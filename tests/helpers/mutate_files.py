"""Damage to files: random errors of disks and networks, and changes by somebody who knows the format."""

import random

NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**24, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
EDGE = 64  # bytes at either end, which hold headers and directories: half of all damage goes there


def mutate(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Return ``content`` after one to four kinds of damage. Splices take bytes from one of ``others``."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not damaged:
            break
        rng.choice(DAMAGE)(damaged, rng, others)
    return bytes(damaged)


def flip(content: bytearray, rng: random.Random, others=()) -> None:
    """Flip one to eight bits."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        content[_place(content, rng)] ^= 1 << rng.randrange(8)


def cut(content: bytearray, rng: random.Random, others=()) -> None:
    del content[_place(content, rng) :]


def _overwrite(content: bytearray, rng: random.Random, others) -> None:
    place = _place(content, rng)
    content[place : place + rng.randint(1, 16)] = rng.randbytes(rng.randint(1, 16))


def _number(content: bytearray, rng: random.Random, others) -> None:
    """Overwrite a place, perhaps a size or an offset, with a number at the limits of its type."""
    width, place = rng.choice((1, 2, 4, 8)), _place(content, rng)
    number = rng.choice(NUMBERS) % 2 ** (8 * width)
    content[place : place + width] = number.to_bytes(width, rng.choice(("little", "big")))


def _digit(content: bytearray, rng: random.Random, others) -> None:
    """Replace a digit of a text, for example in a size of a JSON header."""
    if digits := [i for i, byte in enumerate(content[:4096]) if 48 <= byte < 58]:
        content[rng.choice(digits)] = rng.randint(48, 57)


def _drop(content: bytearray, rng: random.Random, others) -> None:
    place = _place(content, rng)
    del content[place : place + rng.choice((1, 2, 4, 100))]


def _repeat(content: bytearray, rng: random.Random, others) -> None:
    place, length = _place(content, rng), rng.choice((1, 4, 30, 1000))
    content[place:place] = content[place : place + length] * rng.choice((1, 1, 50))


def _splice(content: bytearray, rng: random.Random, others) -> None:
    other = rng.choice(others)
    start, length = rng.randrange(len(other)), rng.choice((4, 30, 1000))
    place = _place(content, rng)
    content[place : place + rng.choice((0, length))] = other[start : start + length]


def _place(content: bytearray, rng: random.Random) -> int:
    edge = min(EDGE, len(content))
    return rng.choice(
        (rng.randrange(len(content)),) * 2 + (rng.randrange(edge), len(content) - 1 - rng.randrange(edge))
    )


DAMAGE = (flip, flip, cut, _overwrite, _number, _digit, _drop, _repeat, _splice)

"""How messages put numbers into words."""


def counted(number: int, noun: str) -> str:
    """The number and its noun, with an s unless it is one: "1 pack", "1,200 packs"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"

from evaluate import score

__all__ = ["score"]

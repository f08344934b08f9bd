"""How much memory a call has at once, by what PyTorch's allocator reports."""

from collections.abc import Callable

from torch.autograd.profiler import profile


def peak(call: Callable[[], object]) -> tuple[object, int]:
    """What `call` returns, and the most bytes that tensors made in it took at once."""
    with profile(profile_memory=True) as made:
        result = call()
    events = [event for event in made.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the profiler saw no allocation"
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return result, most


def size(tensors: object) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)

"""Seconds of a call, by the device's own clock."""

import time

import torch


def seconds_of(run, device):
    """The median; on a CPU (a dry run) of one call, which means nothing."""
    if device == "cuda":
        from triton.testing import do_bench

        return 1e-3 * do_bench(run, warmup=10, rep=50, return_mode="median")
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def graphed(run):
    """The call as a CUDA graph, without the launches' cost to the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        run()
    return graph.replay

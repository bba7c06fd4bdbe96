"""What the measurements share: seconds of alternatives run in turn, and the peak of allocated memory."""

import time

import torch
from torch.profiler import ProfilerActivity, profile


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(*functions, rounds=5, least=4.0):
    """The fastest time of each function, after a warm-up, of `rounds` rounds, or more until `least` seconds
    have passed. The functions run in turn, in the opposite order every second round, so that changes of the
    machine's speed meet all of them and none always comes first."""
    for function in functions:
        function()
    times = {function: [] for function in functions}
    begun, i = time.perf_counter(), 0
    while i < rounds or time.perf_counter() - begun < least:
        for function in functions[:: 1 if i % 2 else -1]:
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            times[function].append(time.perf_counter() - started)
        i += 1
    return [min(times[function]) for function in functions]


def peak_bytes(function):
    """The most memory that was allocated at once during function(), beyond what was before.

    On a GPU it comes from the allocator's own counter. On a CPU it comes from the profiler's record of every
    allocation of a tensor, so without what libraries allocate for themselves. The record lacks what gloo's
    threads free: that counts as freed when its address is used again.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    nodes, events = record.profiler.kineto_results.experimental_event_tree(), []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == "[memory]":
            fields = node.extra_fields
            events.append((node.start_time_ns, fields.ptr, fields.alloc_size))  # size < 0: freed
    now = peak = 0
    live = {}  # address -> bytes
    for _, address, size in sorted(events, key=lambda event: event[0]):
        now += size - (live.pop(address, 0) if size > 0 else 0)
        live.pop(address, None)
        if size > 0:
            live[address] = size
        peak = max(peak, now)
    return peak


def attention_share(function):
    """The share of function()'s time that attention kernels take, by the profiler."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as record:
        function()
        synchronize()
    which = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, which) for event in record.key_averages()}
    return sum(time for key, time in times.items() if "flash" in key) / sum(times.values())

"""How fast this machine reads memory: the limit of anything that reads a model's weights for every token."""
import ctypes
import threading
import time

SIZE = 256 << 20  # bytes of a thread, more than any cache
PASSES = 3

memchr = ctypes.CDLL(None).memchr  # a byte that is not there: reads everything, and writes nothing
memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p


def measure(threads):
    """Bytes a second of `threads` threads together, the best of some passes."""
    buffers = [ctypes.create_string_buffer(SIZE) for _ in range(threads)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, SIZE)  # pages that were never written are all one page
    start = threading.Barrier(threads)
    passes = [[None] * threads for _ in range(PASSES)]

    def read(index):
        address = ctypes.addressof(buffers[index])
        for spans in passes:
            start.wait()
            began = time.perf_counter()
            found = memchr(address, 0, SIZE)
            spans[index] = (began, time.perf_counter(), found)

    readers = [threading.Thread(target=read, args=(i,)) for i in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    if any(found for spans in passes for _, _, found in spans):
        raise AssertionError("the buffers hold only ones")
    return max(threads * SIZE / (max(s[1] for s in spans) - min(s[0] for s in spans)) for spans in passes)


if __name__ == "__main__":
    for count in (1, 2):
        print(f"{count} threads: {measure(count) / 1e9:.1f} GB/s")

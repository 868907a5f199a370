# asyncio, once the application or kbatch.aio has imported it. The rest of kbatch does not import it: that would be a
# tenth of the time of `import kbatch`, for processes that never run an event loop.

cdef object _modules = sys.modules
cdef object _asyncio_module = None
cdef object _running_loop_or_none = None  # asyncio's function, kept as it is called for each batch of a loop


cdef object imported_asyncio():
    """The module; None as long as it is not imported: no loop runs then, and nothing is of a class of asyncio's.

    This imports nothing, also not what is to be loaded when it is used, and raises nothing, so it may be called while
    an error is handled.
    """
    global _asyncio_module, _running_loop_or_none
    if _asyncio_module is None:
        module = _modules.get("asyncio")
        # Another thread may be importing it: asyncio sets `__all__` after the names that are used here.
        if type(module) is ModuleType and "__all__" in module.__dict__:
            _running_loop_or_none = module._get_running_loop
            _asyncio_module = module
    return _asyncio_module


cdef object current_loop():
    """The event loop that runs on this thread, or None."""
    if _running_loop_or_none is None and imported_asyncio() is None:
        return None
    return _running_loop_or_none()


cdef object cancelled_error():
    """asyncio's CancelledError, for ``except`` beside Exception; if it is not imported, Exception once more."""
    asyncio = imported_asyncio()
    return Exception if asyncio is None else asyncio.CancelledError

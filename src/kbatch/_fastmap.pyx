# cython: language_level=3
# No list comprehensions in Cython code: when such a list cannot grow, Cython 3.3.1 gives the new item back twice.
"""The hot path: envelopes become records (phase 1), records become messages of librdkafka (phase 2), delivery
reports become outcomes, and each thread or loop that waits is woken once.

The parts stand in ``native/``, in the order in which a batch meets them: ``envelope``; ``pool``, ``record`` and
``batch`` (who owns what); ``map`` (phase 1); without the GIL ``client``, ``reports``, ``waiting``, ``line``,
``enqueue`` and ``drainer``; and where Python meets the client ``core``. ``read``, ``receive`` and ``pack`` stand beside
``map`` and share ``wire``. ``accumulator`` stands before it all: single envelopes become batches. Structures and
classes are declared in ``_fastmap.pxd``.
"""

import collections
import contextvars
import datetime
import functools
import hashlib
import inspect
import logging
import os
import re
import sys
import threading
import typing
import uuid
import weakref
from collections.abc import Mapping, Sequence
from types import GenericAlias, ModuleType

import msgspec
from msgspec import UNSET

from kbatch._callbacks import callback_name, has_coroutine_methods, refuse_coroutine
from kbatch._checks import check_timeout
from kbatch._errors import (
    BatchError,
    BatchInterruptedError,
    ConfigError,
    DeserializationError,
    ForkError,
    NotYetDueError,
    ProducerClosedError,
    SenderFullError,
    SerializationError,
    exception_text,
    fatal_error,
    named_exception_text,
    shown,
    type_name,
    undelivered_error,
)
from kbatch._serialization import SerializationContext

cimport cython
from cpython.bytearray cimport (
    PyByteArray_AS_STRING,
    PyByteArray_FromStringAndSize,
    PyByteArray_GET_SIZE,
    PyByteArray_Resize,
)
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.datetime cimport PyDateTime_Check, PyDateTimeAPI, import_datetime
from cpython.exc cimport PyErr_CheckSignals
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.pythread cimport PyThread_get_thread_ident
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.math cimport NAN
from libc.stdint cimport INT32_MAX, INT64_MAX, INT64_MIN, int16_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp, memcpy, memset, strcmp, strcpy, strlen

from kbatch._librdkafka cimport *
from kbatch._librdkafka import error_text

cdef extern from *:
    """
    static inline PyObject *kb_tuple_item(PyObject *t, Py_ssize_t i) { return PyTuple_GET_ITEM(t, i); }
    static inline Py_ssize_t kb_tuple_size(PyObject *t) { return PyTuple_GET_SIZE(t); }
    /* For an exception that a C function has set: raises it where Cython can catch it. */
    static inline int kb_raise_pending(void) { return -1; }
    """
    PyObject *PyTuple_GET_ITEM "kb_tuple_item"(PyObject *t, Py_ssize_t i) noexcept
    Py_ssize_t PyTuple_GET_SIZE "kb_tuple_size"(PyObject *t) noexcept
    int raise_pending "kb_raise_pending"() except -1
    Py_ssize_t PY_SSIZE_T_MAX
    object PyUnicode_FromObject(object text)  # an exact str
    object PyUnicode_DecodeUTF8(const char *text, Py_ssize_t length, const char *errors)
    int PyUnicode_CompareWithASCIIString(object text, const char *ascii) noexcept
    object PyObject_Vectorcall(object callable, PyObject **args, size_t nargsf, PyObject *names)
    size_t PY_VECTORCALL_ARGUMENTS_OFFSET
    void PyObject_GC_UnTrack(object item) noexcept
    void PyObject_GC_Track(object item) noexcept
    bint PyObject_GC_IsTracked(object item) noexcept

cdef object _logger = logging.getLogger("kbatch")

include "native/clock.pxi"
include "native/asyncio.pxi"
include "native/text.pxi"
include "native/envelope.pxi"
include "native/gil.pxi"
include "native/fork.pxi"
include "native/pool.pxi"
include "native/record.pxi"
include "native/outcomes.pxi"
include "native/batch.pxi"
include "native/wire.pxi"
include "native/map.pxi"
include "native/read.pxi"
include "native/blocks.pxi"
include "native/receive.pxi"
include "native/pack.pxi"
include "native/client.pxi"
include "native/reports.pxi"
include "native/waiting.pxi"
include "native/line.pxi"
include "native/header_lists.pxi"
include "native/enqueue.pxi"
include "native/queues.pxi"
include "native/drainer.pxi"
include "native/resolver.pxi"
include "native/flag.pxi"
include "native/calls.pxi"
include "native/callback_thread.pxi"
include "native/shared_threads.pxi"
include "native/wakeup.pxi"
include "native/content.pxi"
include "native/undelivered.pxi"
include "native/config.pxi"
include "native/oauth.pxi"
include "native/held.pxi"
include "native/dispatcher.pxi"
include "native/core.pxi"
include "native/accumulator.pxi"
include "native/answer.pxi"

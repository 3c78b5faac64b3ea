# Arguments as the bindings want them: exact objects, or errors with the texts of the contracts.

from cpython.object cimport PyObject_Hash
from cpython.unicode cimport PyUnicode_FromObject
from libc.stdint cimport int64_t


cdef extern from "Python.h":
    bint PyUnicode_Check(object value)
    bint PyUnicode_CheckExact(object value)
    bint PyLong_Check(object value)
    long long PyLong_AsLongLongAndOverflow(object value, int *overflow) except? -1


cdef inline str wrong_type(str name, str wanted, object value):
    return f"{name} must be {wanted}, not {type(value).__name__}"


cdef inline str exact_text(object value, str kind):
    """The value as an exact str whose hash is computed."""
    if not PyUnicode_CheckExact(value):
        if not PyUnicode_Check(value):
            raise TypeError(wrong_type(kind, "str", value))
        value = PyUnicode_FromObject(value)
    PyObject_Hash(value)
    return <str>value


cdef inline int64_t exact_int64(object value, str name, str wanted) except? -1:
    cdef int overflow = 0
    cdef long long number
    if not PyLong_Check(value):
        raise TypeError(wrong_type(name, wanted, value))
    number = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow:
        raise OverflowError(f"{name} does not fit 64 bits")
    return number

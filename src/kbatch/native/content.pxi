# What an envelope holds in memory, about. No Python code runs and no object is made: nobody can change a message.

cdef extern from *:
    """
    #include <structmember.h>

    enum { KB_SAMPLE = 32, KB_STRANGERS = 3, KB_NUMBER = 4 };

    static PyTypeObject *kb_struct_meta;  /* of msgspec's structs; lives as long as msgspec */

    typedef struct {
        int left;       /* objects that may still be looked at */
        int deepest;
        int depth;      /* containers around this one */
        int strangers;  /* of these, objects of any other class: one may lead to a whole program */
        int64_t bytes;
    } kb_look;

    static int kb_has_members(PyTypeObject *type)
    {
        for (; type != NULL && (type->tp_flags & Py_TPFLAGS_HEAPTYPE); type = type->tp_base)
            if (type->tp_members != NULL)
                return 1;
        return 0;
    }

    static int64_t kb_rare_bytes(PyObject *o)
    {
        PyTypeObject *type = Py_TYPE(o);
        if (type == &PyByteArray_Type)
            return PyByteArray_GET_SIZE(o);
        if (PyMemoryView_Check(o))
            return PyMemoryView_GET_BUFFER(o)->len;
        return (type->tp_flags & Py_TPFLAGS_HAVE_GC) || kb_has_members(type) ? -1 : KB_NUMBER;
    }

    /* Of text, bytes, numbers and what else holds no other object; -1 of what may. */
    static inline int64_t kb_leaf_bytes(PyObject *o)
    {
        unsigned long flags = Py_TYPE(o)->tp_flags;
        if (flags & Py_TPFLAGS_UNICODE_SUBCLASS)
            return (int64_t) PyUnicode_GET_LENGTH(o) * PyUnicode_KIND(o);
        if (flags & Py_TPFLAGS_BYTES_SUBCLASS)
            return PyBytes_GET_SIZE(o);
        if ((flags & Py_TPFLAGS_LONG_SUBCLASS) || Py_TYPE(o) == &PyFloat_Type || o == Py_None)
            return KB_NUMBER;
        if (flags & (Py_TPFLAGS_DICT_SUBCLASS | Py_TPFLAGS_LIST_SUBCLASS | Py_TPFLAGS_TUPLE_SUBCLASS))
            return -1;
        return kb_rare_bytes(o);
    }

    /* Of a container that is not looked into. */
    static inline int64_t kb_closed_bytes(PyObject *o)
    {
        unsigned long flags = Py_TYPE(o)->tp_flags;
        if (flags & Py_TPFLAGS_DICT_SUBCLASS)
            return 2 * KB_NUMBER * PyDict_GET_SIZE(o);
        return flags & (Py_TPFLAGS_LIST_SUBCLASS | Py_TPFLAGS_TUPLE_SUBCLASS) ? KB_NUMBER * Py_SIZE(o) : 0;
    }

    static int64_t kb_pairs_bytes(PyObject *pairs)
    {
        int64_t total = 0;
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(pairs); i++) {
            PyObject *pair = PyTuple_GET_ITEM(pairs, i);
            if (!PyTuple_Check(pair))
                continue;
            for (Py_ssize_t j = 0; j < PyTuple_GET_SIZE(pair); j++) {
                int64_t bytes = kb_leaf_bytes(PyTuple_GET_ITEM(pair, j));
                total += bytes > 0 ? bytes : 0;
            }
        }
        return total;
    }

    static int64_t kb_look_at(PyObject *o, kb_look *look);

    static int kb_visit(PyObject *o, void *look)
    {
        ((kb_look *) look)->bytes += kb_look_at(o, (kb_look *) look);
        return ((kb_look *) look)->left <= 0;
    }

    static int64_t kb_extrapolated(int64_t total, Py_ssize_t seen, Py_ssize_t count)
    {
        return seen < count && seen ? (int64_t) ((double) total / (double) seen * (double) count) : total;
    }

    static int64_t kb_members_bytes(PyObject *o, kb_look *look)  /* of a class that the garbage collector leaves out */
    {
        int64_t total = 0;
        for (PyTypeObject *type = Py_TYPE(o); type != NULL; type = type->tp_base) {
            if (!(type->tp_flags & Py_TPFLAGS_HEAPTYPE) || type->tp_members == NULL)
                continue;
            for (PyMemberDef *member = type->tp_members; member->name != NULL; member++) {
                PyObject *value;
                if (member->type != 16 || member->flags & ~1)  /* T_OBJECT_EX: what __slots__ makes; READONLY */
                    continue;
                value = *(PyObject **) ((char *) o + member->offset);
                if (value != NULL && look->left > 0)
                    total += 2 + kb_look_at(value, look);
            }
        }
        return total;
    }

    static int64_t kb_look_at(PyObject *o, kb_look *look)
    {
        int64_t total = kb_leaf_bytes(o), outside;
        Py_ssize_t count, seen = 0, at = 0, step;
        PyObject *key, *value;
        int is_stranger;
        look->left--;
        if (total >= 0)
            return total;
        if (look->left <= 0 || look->depth >= look->deepest)
            return kb_closed_bytes(o);
        total = 0;
        look->depth++;
        if (PyDict_Check(o)) {
            count = PyDict_Size(o);
            while ((seen < KB_SAMPLE || count <= look->left) && look->left > 0 && PyDict_Next(o, &at, &key, &value)) {
                total += 2 + kb_look_at(key, look) + kb_look_at(value, look);
                seen++;
            }
            total = kb_extrapolated(total, seen, count);
        } else if (PyList_Check(o) || PyTuple_Check(o)) {
            count = Py_SIZE(o);
            step = count <= look->left / 2 ? 1 : count / KB_SAMPLE + 1;
            for (at = 0; at < count && look->left > 0; at += step) {
                total += 2 + kb_look_at(PyList_Check(o) ? PyList_GET_ITEM(o, at) : PyTuple_GET_ITEM(o, at), look);
                seen++;
            }
            total = kb_extrapolated(total, seen, count);
        } else if (!PyObject_IS_GC(o)) {
            total = kb_members_bytes(o, look);
        } else if (Py_TYPE(o)->tp_traverse != NULL && !PyType_Check(o) && !PyModule_Check(o) && !PyFunction_Check(o)
                   && !PyCFunction_Check(o) && !PyMethod_Check(o)) {
            is_stranger = Py_TYPE((PyObject *) Py_TYPE(o)) != kb_struct_meta && !PyAnySet_Check(o);
            if (look->strangers + is_stranger <= KB_STRANGERS) {
                look->strangers += is_stranger;
                outside = look->bytes;
                look->bytes = 0;
                Py_TYPE(o)->tp_traverse(o, kb_visit, look);
                total = look->bytes;
                look->bytes = outside;
                look->strangers -= is_stranger;
            }
        }
        look->depth--;
        return total;
    }

    static void kb_set_struct_meta(PyObject *meta) { kb_struct_meta = (PyTypeObject *) meta; }

    typedef struct {
        int left;
        int64_t bytes;
    } kb_glance;

    static int kb_glance_at(PyObject *o, void *glance)
    {
        int64_t bytes = kb_leaf_bytes(o);
        ((kb_glance *) glance)->bytes += bytes >= 0 ? bytes : kb_closed_bytes(o);
        return --((kb_glance *) glance)->left <= 0;
    }

    /* The same of the first values of the outermost container alone, in a few nanoseconds. */
    static int64_t kb_outer_bytes(PyObject *o, int looks)
    {
        kb_glance glance = {looks, 0};
        Py_ssize_t at = 0;
        PyObject *value;
        int64_t bytes = kb_leaf_bytes(o);
        if (bytes >= 0)
            return bytes;
        if (PyDict_Check(o)) {
            while (PyDict_Next(o, &at, NULL, &value) && !kb_glance_at(value, &glance))
                ;
        } else if (PyList_Check(o) || PyTuple_Check(o)) {
            while (at < Py_SIZE(o) && !kb_glance_at(
                    PyList_Check(o) ? PyList_GET_ITEM(o, at) : PyTuple_GET_ITEM(o, at), &glance))
                at++;
        } else if (!PyObject_IS_GC(o)) {
            kb_look look = {looks, 1, 1, 0, 0};
            return kb_members_bytes(o, &look);
        } else if (Py_TYPE(o)->tp_traverse != NULL) {
            Py_TYPE(o)->tp_traverse(o, kb_glance_at, &glance);
        }
        return glance.bytes;
    }

    static int64_t kb_content_bytes(PyObject *o, int looks, int deepest)
    {
        kb_look look = {looks, deepest, 0, 0, 0};
        return kb_look_at(o, &look);
    }
    """
    int64_t kb_leaf_bytes(PyObject *o) noexcept
    int64_t kb_pairs_bytes(PyObject *pairs) noexcept
    int64_t kb_outer_bytes(PyObject *o, int looks) noexcept
    int64_t kb_content_bytes(PyObject *o, int looks, int deepest) noexcept
    void kb_set_struct_meta(object meta) noexcept


kb_set_struct_meta(type(msgspec.Struct))

# What an envelope holds in memory, about. No Python code runs and no object is made: nobody can change a message.

cdef extern from *:
    """
    #include <structmember.h>

    enum { KB_SAMPLE = 32, KB_MOST = 1024, KB_STRANGERS = 6, KB_NUMBER = 4 };

    static PyTypeObject *kb_struct_meta;  /* of msgspec's structs; lives as long as msgspec, as the next */
    static PyTypeObject *kb_raw;

    typedef struct {
        int left;       /* objects that may still be looked at */
        int deepest;
        int depth;      /* containers around this one */
        int strangers;  /* of these, objects of any other class: one may lead to a whole program */
        int visited;    /* of the container */
        int inner;      /* containers in it that are to be looked into */
        int is_deep;    /* they are */
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
        Py_buffer raw;
        if (PyByteArray_Check(o))
            return PyByteArray_GET_SIZE(o);
        if (PyMemoryView_Check(o))
            return PyMemoryView_GET_BUFFER(o)->len;
        if (type == kb_raw && PyObject_GetBuffer(o, &raw, PyBUF_SIMPLE) == 0) {
            PyBuffer_Release(&raw);
            return raw.len;
        }
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

    /* A container is looked at twice: at what holds no other object, so that no neighbour hides it, then into the rest,
       of which each has its share of the looks. */
    static int64_t kb_look_at(PyObject *o, kb_look *look);

    static int64_t kb_look_inside(PyObject *o, kb_look *look)
    {
        int budget = look->inner > 1 ? look->left / look->inner : look->left, others = look->left - budget;
        int inner = look->inner, visited = look->visited, is_deep = look->is_deep;
        int64_t total;
        look->left = budget;
        total = kb_look_at(o, look);
        look->left += others;
        look->inner = inner - 1, look->visited = visited, look->is_deep = is_deep;
        return total;
    }

    static int64_t kb_look_once(PyObject *o, kb_look *look)
    {
        int64_t total = kb_leaf_bytes(o);
        look->visited++;
        if (look->is_deep)
            return total < 0 && look->left > 0 ? kb_look_inside(o, look) : 0;
        look->left--;
        look->inner += total < 0;
        return total < 0 ? 0 : total;
    }

    static int kb_visit(PyObject *o, void *look)
    {
        ((kb_look *) look)->bytes += kb_look_once(o, (kb_look *) look);
        return ((kb_look *) look)->left <= 0 || ((kb_look *) look)->visited >= KB_MOST;
    }

    static int64_t kb_extrapolated(int64_t total, Py_ssize_t seen, Py_ssize_t count, kb_look *look)
    {
        /* Not of what belongs to another object's object: that may be a whole program. */
        return seen < count && seen && look->strangers < 2 ? (int64_t) ((double) total / (double) seen * (double) count)
                                                           : total;
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
                    total += (look->is_deep ? 0 : 2) + kb_look_once(value, look);
            }
        }
        return total;
    }

    static int64_t kb_container_bytes(PyObject *o, kb_look *look)
    {
        int64_t total = 0, outside = look->bytes, separator = look->is_deep ? 0 : 2;
        Py_ssize_t count, seen = 0, at = 0, step;
        PyObject *key, *value;
        if (PyDict_Check(o)) {
            count = PyDict_Size(o);
            while ((seen < KB_SAMPLE || count <= look->left) && look->left > 0 && PyDict_Next(o, &at, &key, &value)) {
                total += separator + kb_look_once(key, look) + kb_look_once(value, look);
                seen++;
            }
            return kb_extrapolated(total, seen, count, look);
        }
        if (PyList_Check(o) || PyTuple_Check(o)) {
            count = Py_SIZE(o);
            step = count <= look->left / 2 ? 1 : count / KB_SAMPLE + 1;
            for (at = 0; at < count && look->left > 0; at += step) {
                value = PyList_Check(o) ? PyList_GET_ITEM(o, at) : PyTuple_GET_ITEM(o, at);
                total += separator + kb_look_once(value, look);
                seen++;
            }
            return kb_extrapolated(total, seen, count, look);
        }
        if (!PyObject_IS_GC(o))
            return kb_members_bytes(o, look);
        look->bytes = 0;
        Py_TYPE(o)->tp_traverse(o, kb_visit, look);
        total = look->bytes;
        look->bytes = outside;
        return PyAnySet_Check(o) ? kb_extrapolated(total, look->visited, PySet_GET_SIZE(o), look) : total;
    }

    static int kb_is_stranger(PyObject *o)
    {
        return PyObject_IS_GC(o) && !PyDict_Check(o) && !PyList_Check(o) && !PyTuple_Check(o) && !PyAnySet_Check(o)
            && Py_TYPE((PyObject *) Py_TYPE(o)) != kb_struct_meta;
    }

    static int64_t kb_look_at(PyObject *o, kb_look *look)
    {
        int64_t total = kb_leaf_bytes(o);
        int is_stranger;
        look->left--;
        if (total >= 0)
            return total;
        if (look->left <= 0 || look->depth >= look->deepest)
            return kb_closed_bytes(o);
        is_stranger = kb_is_stranger(o);
        if (is_stranger && (Py_TYPE(o)->tp_traverse == NULL || PyType_Check(o) || PyModule_Check(o)
                            || PyFunction_Check(o) || PyCFunction_Check(o) || PyMethod_Check(o)))
            return 0;
        if (look->strangers + is_stranger > KB_STRANGERS)
            return 0;
        look->depth++;
        look->strangers += is_stranger;
        look->inner = look->visited = look->is_deep = 0;
        total = kb_container_bytes(o, look);
        if (look->inner && look->left > 0) {
            look->is_deep = 1;
            look->visited = 0;
            total += kb_container_bytes(o, look);
        }
        look->strangers -= is_stranger;
        look->depth--;
        return total;
    }

    static void kb_set_msgspec_types(PyObject *meta, PyObject *raw)
    {
        kb_struct_meta = (PyTypeObject *) meta;
        kb_raw = (PyTypeObject *) raw;
    }

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
            kb_look look = {looks, 1, 1, 0, 0, 0, 0, 0};
            return kb_members_bytes(o, &look);
        } else if (Py_TYPE(o)->tp_traverse != NULL) {
            Py_TYPE(o)->tp_traverse(o, kb_glance_at, &glance);
        }
        return glance.bytes;
    }

    static int64_t kb_content_bytes(PyObject *o, int looks, int deepest)
    {
        kb_look look = {looks, deepest, 0, 0, 0, 0, 0, 0};
        return kb_look_at(o, &look);
    }
    """
    int64_t kb_leaf_bytes(PyObject *o) noexcept
    int64_t kb_pairs_bytes(PyObject *pairs) noexcept
    int64_t kb_outer_bytes(PyObject *o, int looks) noexcept
    int64_t kb_content_bytes(PyObject *o, int looks, int deepest) noexcept
    void kb_set_msgspec_types(object meta, object raw) noexcept


kb_set_msgspec_types(type(msgspec.Struct), msgspec.Raw)

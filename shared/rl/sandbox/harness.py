"""What runs inside. The texts are read by the interpreter of the sandbox, never imported.

``CALLS`` and ``SCRIPT`` share an interpreter with the solution, so nothing they say is trusted: values are compared
where no code of the solution runs. Each takes its code from a file descriptor (an argument has a length limit, and no
null bytes) and first says ``ready`` on a private pipe: what fails before is the sandbox's fault, what fails after is
the solution's.
"""

# The first lines of all. Nothing is imported from the working folder; ``exit`` is there, which ``-S`` leaves out; and
# the caller's session keyring (of the kernel) is left for an empty one, where the machine knows such a thing.
_FIRST = r"""
import sys
sys.path[:] = [path for path in sys.path if path]
import builtins
builtins.exit = builtins.quit = sys.exit
try:
    import ctypes, os
    _number = {"x86_64": 250, "aarch64": 219, "riscv64": 219}.get(os.uname().machine)
    if _number is not None:
        ctypes.CDLL(None).syscall(_number, 1, None)
    del ctypes, os, _number
except (ImportError, OSError, AttributeError):  # no ctypes, or a C library without it
    pass
_sys = sys
del sys, builtins
"""

# The common beginning of CALLS and CHECK. JSON knows no tuples, sets and keys that are not text: `_pack` writes plain
# values of Python so that `_unpack` makes values of exactly these types again, whatever the solution's types could do.
_BEGIN = (
    _FIRST
    + r"""
import json as _json, os as _os, types as _types
_in = _os.fdopen(_os.dup(0), "rb")
_out = int(_sys.argv[2])
_null = _os.open("/dev/null", _os.O_RDONLY)
_os.dup2(_null, 0)
_dumps, _loads, _write = _json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode, _json.loads, _os.write
with _os.fdopen(int(_sys.argv[1]), "rb") as _file:
    _code = _loads(_file.read())
_module = _sys.modules["solution"] = _types.ModuleType("solution")  # dataclasses and pickle look for it
_scope = _module.__dict__
def _say(tag, kind, value):
    try:
        line = _dumps(value)
    except BaseException as error:
        kind, line = "raised", _dumps("the value is not JSON: " + type(error).__name__)
    data = (tag + " " + kind + " " + line).encode("ascii") + b"\n"
    while data:
        data = data[_write(_out, data):]
def _short(error):
    try:
        return (type(error).__name__ + ": " + str(error))[:300]
    except BaseException:
        return "an exception that cannot be shown"
def _pack(value):
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        value = float(value)
        return value if value - value == 0 else ["f", repr(value)]
    if isinstance(value, complex):
        return ["c", _pack(value.real), _pack(value.imag)]
    if isinstance(value, (bytes, bytearray)):
        return ["b", bytes(value).hex()]
    for name, kind in _KINDS:
        if isinstance(value, kind):
            return [name, [_pack(item) for item in value]]
    if isinstance(value, dict):
        return ["d", [[_pack(key), _pack(item)] for key, item in value.items()]]
    raise TypeError("the value is a " + type(value).__name__)
def _unpack(value):
    if not isinstance(value, list):
        return value
    name, item = value[0], value[1]
    if name == "f":
        return float(item)
    if name == "c":
        return complex(_unpack(item), _unpack(value[2]))
    if name == "b":
        return bytes.fromhex(item)
    if name == "d":
        return {_unpack(key): _unpack(inner) for key, inner in item}
    return dict(_KINDS)[name](_unpack(inner) for inner in item)
_KINDS = (("l", list), ("t", tuple), ("s", set), ("z", frozenset))
"""
)

CALLS = (
    _BEGIN
    + r"""
_write(_out, b"ready\n")
_tag = _loads(_in.readline())["tag"]
try:
    for _part in _code:
        exec(compile(_part, "solution.py", "exec"), _scope)
except BaseException as error:
    _say(_tag, "raised", _short(error))
else:
    _say(_tag, "value", None)
while True:
    _line = _in.readline()
    if not _line:
        break
    _call = _loads(_line)
    try:
        if not callable(_scope.get(_call["function"])):
            raise NameError("there is no function " + _call["function"])
        if "packed" in _call:
            _value = _pack(_scope[_call["function"]](*_unpack(_call["packed"][0]), **_unpack(_call["packed"][1])))
        else:
            _value = _scope[_call["function"]](*_call["args"], **_call["kwargs"])
    except BaseException as error:
        _say(_call["tag"], "raised", _short(error))
    else:
        _say(_call["tag"], "value", _value)
_os._exit(0)
"""
)

# The other side of a check: a dataset's own test code, apart from the solution, whose function it calls by way of the
# parent. One message a turn in either direction.
CHECK = (
    _BEGIN
    + r"""
_ERRORS = {
    name: getattr(__builtins__, name)
    for name in (
        "ArithmeticError AssertionError AttributeError EOFError IndexError KeyError LookupError NameError "
        "NotImplementedError OSError OverflowError RecursionError RuntimeError StopIteration TypeError ValueError "
        "ZeroDivisionError"
    ).split()
}
def _turn(kind, value):
    global _tag
    _say(_tag, kind, value)
    line = _in.readline()
    if not line:
        _os._exit(0)
    message = _loads(line)
    _tag = message["tag"]
    return message
def _candidate(*args, **kwargs):
    message = _turn("value", {"packed": [_pack(args), _pack(kwargs)]})
    if "raised" in message:
        name, _, text = message["raised"].partition(": ")
        kind = _ERRORS.get(name)
        raise kind(text) if kind else RuntimeError(message["raised"])
    try:
        return _unpack(message["packed"])
    except BaseException:  # the solution wrote something that is no value: no exception of the test's to catch
        _say(_tag, "raised", "the value is not plain")
        _os._exit(0)
_write(_out, b"ready\n")
_tag = _loads(_in.readline())["tag"]
try:
    _stand_in = {"__name__": "check", "__builtins__": __builtins__}
    exec(compile(_code["setup"], "setup.py", "exec"), _stand_in)
    _stand_in[_code["function"]] = _candidate
    exec(compile(_code["check"], "check.py", "exec"), _stand_in)
    _stand_in["check"](_candidate)
except BaseException as error:
    _turn("raised", _short(error))
else:
    _turn("value", {"passed": True})
_os._exit(0)
"""
)

SCRIPT = (
    _FIRST
    + r"""
def _script():
    import os, sys
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        code = file.read()
    os.write(int(sys.argv[2]), b"ready\n")
    os.close(int(sys.argv[2]))
    os.read(0, 1)  # the parent has seen who is to be collected
    sys.argv[:] = ["script.py"]
    del globals()["_script"], globals()["_sys"]
    return compile(code, "script.py", "exec")
exec(_script())
"""
)

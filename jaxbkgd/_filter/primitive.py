"""The separable filter: symmetric kernels along y and x, or along time.

The filter is a JAX primitive of its own, so that each of its rules is written once:

- It is linear in the frames. Where it repeats edges, its transpose is the adjoint filter:
  pad with zeros, filter, and fold what fell outside back onto the edge.
- Its derivative in a radius is the same filter with the derivative of that axis'
  kernel. All images that a derivative needs come out of one call and share passes.
- A gradient in the radii is the product of the frames with what the adjoint filters make
  of the cotangent. It shares passes with the gradient in the frames, and keeps no images.
- Under `vmap`, mapped frames become one larger stack, and mapped radii a loop.
- Each platform has a lowering of its own: a loop over pieces that stay in cache on CPU,
  the whole stack at once elsewhere.

Along time the stack is an image, frames high and as wide as a frame has pixels, which is
filtered along its height alone.
"""

import functools as ft
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval
from jaxtyping import Array, Float, Shaped

from .engines import (
    Edges,
    filter_at_once,
    filter_in_pieces,
    Kernel,
    Kernels,
    weighted,
    without,
)


_ADJOINT: dict[Edges, Edges] = {
    "repeated": "folded",
    "folded": "repeated",
    "empty": "empty",
}


def separable_filter(
    frames: Shaped[Array, "*batch height width"],
    radii: Sequence[Float[Array, ""]],
    kernels: Kernels,
    *,
    is_finite: bool = False,
    spent: Float[Array, "*batch height width"] | None = None,
) -> Float[Array, "*batch height width"]:
    """Correlates each frame with the outer product of `kernels`, repeating its edges.

    The result has the dtype of the radii; frames of any real dtype are converted as they
    are filtered. Where it is known that they are finite, there is less to compile.

    On CPU the result is written over a spent image of its shape and dtype. What is compiled
    with that cannot be differentiated.
    """
    if spent is None:
        return _filtered(frames, radii, kernels, "repeated", is_finite)
    (image,) = _filter_over_p.bind(
        *(spent, frames, *radii), outputs=(kernels,), edges="repeated", is_finite=is_finite
    )
    return image


def temporal_filter(
    frames: Shaped[Array, "*batch frames height width"],
    radius: Float[Array, ""],
    kernel: Kernel,
    edges: Edges,
    *,
    is_finite: bool = False,
) -> Float[Array, "*batch frames height width"]:
    """Correlates each pixel's course in time with `kernel`.

    What becomes of a frame does not depend, to the bit, on how many there are before and
    after those that the kernel covers.
    """
    *batch, count, height, width = frames.shape
    courses = frames.reshape((*batch, count, height * width))
    filtered = _filtered(courses, [radius], (kernel,), edges, is_finite)
    return filtered.reshape(frames.shape)


def _filtered(frames, radii, kernels, edges, is_finite):
    # Under `shard_map`, frames that all devices share become each device's own where the
    # radii are. It costs nothing: compiled, nothing is added.
    frames = sum((jnp.zeros_like(radius, frames.dtype) for radius in radii), frames)
    (image,) = _filter_p.bind(
        frames, *radii, outputs=(kernels,), edges=edges, is_finite=is_finite
    )
    return image


_filter_p = Primitive("separable_filter")
_filter_p.multiple_results = True


@_filter_p.def_impl
@ft.partial(jax.jit, static_argnames=("outputs", "edges", "is_finite"))
def _impl(*arguments, **parameters):
    return _filter_p.bind(*arguments, **parameters)


@_filter_p.def_abstract_eval
def _abstract_eval(frames, *radii, outputs, edges, is_finite):
    del edges, is_finite
    return [frames.update(dtype=radii[0].dtype, weak_type=False) for _ in outputs]


def _jvp(primals, tangents, *, outputs, **parameters):
    (frames, *radii), (frames_dot, *radii_dot) = primals, tangents
    bind = ft.partial(_filter_p.bind, **parameters)
    axes = tuple(
        axis
        for axis, radius_dot in enumerate(radii_dot)
        if not isinstance(radius_dot, ad.Zero)
    )
    if axes and len(outputs) == 1:
        (kernels,) = outputs
        # Under `shard_map`, each device has a gradient of its own.
        zero = jnp.zeros_like(frames, radii[0].dtype, shape=())
        dots = [radii_dot[axis] + zero for axis in axes]
        if not isinstance(frames_dot, ad.Zero):
            dots.append(frames_dot)
        derivatives = tuple(_differentiated(kernels, axis) for axis in axes)
        tangent, image = _image_and_pushforward_p.bind(
            *(frames, *radii, *dots),
            kernels=kernels,
            outputs=(*derivatives, kernels),
            **parameters,
        )
        return [image], [tangent]
    derivatives = {
        (index, axis): _differentiated(kernels, axis)
        for index, kernels in enumerate(outputs)
        for axis in axes
    }
    # Of mixed derivatives, some are the same.
    wanted = tuple(dict.fromkeys((*outputs, *derivatives.values())))
    images = dict(zip(wanted, bind(frames, *radii, outputs=wanted), strict=True))
    terms = [[] for _ in outputs]
    for (index, axis), kernels in derivatives.items():
        terms[index].append(radii_dot[axis] * images[kernels])
    if not isinstance(frames_dot, ad.Zero):
        for term, image in zip(
            terms, bind(frames_dot, *radii, outputs=outputs), strict=True
        ):
            term.append(image)
    primals = [images[kernels] for kernels in outputs]
    return primals, [ft.reduce(jnp.add, term) for term in terms]


def _differentiated(kernels: Kernels, axis: int) -> Kernels:
    return (*kernels[:axis], kernels[axis].derivative(), *kernels[axis + 1 :])


def _transpose(cotangents, frames, *radii, outputs, edges, is_finite):
    assert ad.is_undefined_primal(frames)
    bind = ft.partial(_filter_p.bind, edges=_ADJOINT[edges], is_finite=is_finite)
    bars = [
        bind(cotangent, *radii, outputs=(kernels,))
        for cotangent, kernels in zip(cotangents, outputs, strict=True)
        if not isinstance(cotangent, ad.Zero)
    ]
    frames_bar = ft.reduce(jnp.add, [bar for (bar,) in bars]) if bars else None
    return [frames_bar, *(None for _ in radii)]


def _batch(arguments, dims, **parameters):
    (frames, *radii), (frames_dim, *radii_dims) = arguments, dims
    bind = ft.partial(_filter_p.bind, **parameters)
    if frames_dim is not None:
        frames = jnp.moveaxis(frames, frames_dim, 0)
    sizes = {
        radius.shape[0]
        for radius, dim in zip(radii, radii_dims, strict=True)
        if dim is not None
    }
    if not sizes:
        images = bind(frames, *radii)
    else:
        radii = [jnp.broadcast_to(radius, tuple(sizes)) for radius in radii]
        if frames_dim is None:
            images = lax.map(lambda radii: bind(frames, *radii), radii)
        else:
            images = lax.map(lambda args: bind(*args), [frames, *radii])
    return images, [0] * len(images)


ad.primitive_jvps[_filter_p] = _jvp
ad.primitive_transposes[_filter_p] = _transpose
batching.primitive_batchers[_filter_p] = _batch


# The derivative of the image of some kernels, and its transpose. They are primitives, so
# that on CPU the images that they add up, or multiply with the frames, need not be kept.


def _pushforward(frames, *radii_and_dots, kernels, outputs, **parameters):
    """The sum of the outputs, which are derivatives in radii, weighted with the tangents of
    these. One tangent more is that of the frames, one output more the image itself."""
    radii, dots = radii_and_dots[: len(kernels)], radii_and_dots[len(kernels) :]
    images = _filter_p.bind(frames, *radii, outputs=outputs, **parameters)
    weights = _weights(dots, kernels, outputs)
    results = weighted(images, weights)
    return _plus_moved(results, dots[len(weights) :], radii, kernels, **parameters)


def _pushforward_in_pieces(
    frames, *radii_and_dots, kernels, outputs, is_exported=False, **parameters
):
    radii, dots = radii_and_dots[: len(kernels)], radii_and_dots[len(kernels) :]
    weights = _weights(dots, kernels, outputs)
    results = filter_in_pieces(
        *(frames, radii, outputs),
        kernels=kernels,
        weights=weights,
        is_exported=is_exported,
        **parameters,
    )
    return _plus_moved(results, dots[len(weights) :], radii, kernels, **parameters)


def _weights(dots, kernels, outputs):
    return dots[: len(without(kernels, outputs))]


def _plus_moved(results, frames_dots, radii, kernels, **parameters):
    tangent, *others = results
    for frames_dot in frames_dots:
        (moved,) = _filter_p.bind(frames_dot, *radii, outputs=(kernels,), **parameters)
        tangent += moved
    return [tangent, *others]


def _pullback(cotangent, frames, *radii, kernels, outputs, **parameters):
    """For each output the sum of its products with the frames; of the kernels themselves
    the image."""
    images = _filter_p.bind(cotangent, *radii, outputs=outputs, **parameters)
    return [
        image if output == kernels else jnp.sum(image * frames)
        for output, image in zip(outputs, images, strict=True)
    ]


def _pullback_in_pieces(cotangent, frames, *radii, kernels, outputs, **parameters):
    return filter_in_pieces(
        *(cotangent, radii, outputs), kernels=kernels, factor=frames, **parameters
    )


def _batch_as(function, arguments, dims, **parameters):
    of_one = ft.partial(function, **parameters)
    results = jax.vmap(of_one, in_axes=tuple(dims))(*arguments)
    return results, [0] * len(results)


def _primitive_as(function, name, abstract_eval) -> Primitive:
    """A primitive that does what the function does, and is differentiated as it is."""
    primitive = Primitive(name)
    primitive.multiple_results = True
    static = ("kernels", "outputs", "edges", "is_finite")

    @primitive.def_impl
    @ft.partial(jax.jit, static_argnames=static)
    def impl(*arguments, **parameters):
        return primitive.bind(*arguments, **parameters)

    def jvp(primals, tangents, **parameters):
        moving = {
            index: tangent
            for index, tangent in enumerate(tangents)
            if not isinstance(tangent, ad.Zero)
        }

        def of_moving(*values):
            arguments = list(primals)
            for index, value in zip(moving, values, strict=True):
                arguments[index] = value
            return function(*arguments, **parameters)

        values = [primals[index] for index in moving]
        return jax.jvp(of_moving, values, list(moving.values()))

    primitive.def_abstract_eval(abstract_eval)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = ft.partial(_batch_as, function)
    return primitive


def _abstract_pushforward(frames, radius, *_, kernels, outputs, **__):
    image = frames.update(dtype=radius.dtype, weak_type=False)
    return [image, image] if kernels in outputs else [image]


_pushforward_p = _primitive_as(
    _pushforward, "separable_filter_pushforward", _abstract_pushforward
)
_image_and_pushforward_p = _primitive_as(
    _pushforward, "separable_filter_and_pushforward", _abstract_pushforward
)
_pullback_p = _primitive_as(
    _pullback,
    "separable_filter_pullback",
    lambda cotangent, *_, kernels, outputs, **__: [
        cotangent if output == kernels else cotangent.update(shape=(), weak_type=False)
        for output in outputs
    ],
)


def _transpose_pushforward(
    cotangents, frames, *radii_and_dots, kernels, outputs, edges, is_finite
):
    (cotangent,) = cotangents
    radii, dots = radii_and_dots[: len(kernels)], radii_and_dots[len(kernels) :]
    if isinstance(cotangent, ad.Zero):
        return [None] * (1 + len(radii_and_dots))
    if len(dots) > len(outputs):
        outputs = (*outputs, kernels)
    bars = _pullback_p.bind(
        *(cotangent, frames, *radii),
        kernels=kernels,
        outputs=outputs,
        edges=_ADJOINT[edges],
        is_finite=is_finite,
    )
    return [
        *[None] * (1 + len(radii)),
        *(
            bar if ad.is_undefined_primal(dot) else None
            for bar, dot in zip(bars, dots, strict=True)
        ),
    ]


def _batch_tangents(arguments, dims, *, kernels, outputs, **parameters):
    inputs = slice(1 + len(kernels))
    if any(dim is not None for dim in dims[inputs]):
        return _batch_as(
            *(_pushforward, arguments, dims),
            kernels=kernels,
            outputs=outputs,
            **parameters,
        )
    # Where tangents alone are mapped, as by `jax.jacfwd`, there is one image.
    of_image, of_derivative = _split(kernels, outputs, **parameters)
    image = _filter_p.bind(*arguments[inputs], **of_image)
    tangent, out_dims = _batch_as(_pushforward, arguments, dims, **of_derivative)
    return [*tangent, *image], [*out_dims, None]


def _split(kernels, outputs, **parameters):
    """The parameters of the image by itself, and of its derivative."""
    derivative = {"kernels": kernels, "outputs": outputs[:-1]}
    return {"outputs": (kernels,), **parameters}, derivative | parameters


def _partial_eval(trace, *arguments, **parameters):
    """Backwards, the image is known and the derivative waits for its tangents."""
    of_image, of_derivative = _split(**parameters)
    inputs = arguments[: 1 + len(parameters["kernels"])]
    image = trace.process_primitive(_filter_p, inputs, of_image)
    tangent = trace.process_primitive(_pushforward_p, arguments, of_derivative)
    return [*tangent, *image]


def _partial_eval_of_checkpoint(is_saved, unknown, instantiated, eqn):
    """The same in a program under `jax.checkpoint`: what is known, what is left for the way
    back, which results are not known, and which are there on the way back."""
    residuals = [
        v for v, is_there in zip(eqn.invars, instantiated, strict=True) if not is_there
    ]
    inputs = slice(1 + len(eqn.params["kernels"]))
    if not any(unknown):
        return eqn, eqn, [False, False], [True, True], residuals
    if any(unknown[inputs]):
        return None, eqn, [True, True], [True, True], residuals
    of_image, of_derivative = _split(**eqn.params)
    tangent, image = eqn.outvars
    known = eqn.replace(
        primitive=_filter_p, invars=eqn.invars[inputs], outvars=[image], params=of_image
    )
    avals = [each.aval for each in known.invars]
    if is_saved(_filter_p, *avals, **of_image) is not True:
        return known, eqn, [True, False], [True, True], residuals
    left = eqn.replace(primitive=_pushforward_p, outvars=[tangent], params=of_derivative)
    return known, left, [True, False], [True, False], residuals


ad.primitive_transposes[_pushforward_p] = _transpose_pushforward
partial_eval.custom_partial_eval_rules[_image_and_pushforward_p] = _partial_eval
partial_eval.partial_eval_jaxpr_custom_rules[_image_and_pushforward_p] = (
    _partial_eval_of_checkpoint
)
batching.primitive_batchers[_image_and_pushforward_p] = _batch_tangents


# The filter that writes over a spent image, for one who does nothing else with it.

_filter_over_p = Primitive("separable_filter_over")
_filter_over_p.multiple_results = True


@_filter_over_p.def_abstract_eval
def _abstract_over(spent, *arguments, **parameters):
    del spent
    return _abstract_eval(*arguments, **parameters)


def _filter_over_at_once(spent, *arguments, **parameters):
    del spent
    return _filter_at_once(*arguments, **parameters)


def _filter_over_in_pieces(spent, *arguments, **parameters):
    return _filter_in_pieces(*arguments, spent=spent, **parameters)


# On CPU in pieces, elsewhere at once.


def _filter_at_once(frames, *radii, **parameters):
    return filter_at_once(frames, radii, **parameters)


def _filter_in_pieces(frames, *radii, outputs, **parameters):
    return filter_in_pieces(frames, radii, outputs, kernels=outputs[0], **parameters)


def _lowering_in_pieces(function):
    def lower(context, *arguments, **parameters):
        is_exported = context.module_context.lowering_parameters.for_export
        in_pieces = ft.partial(function, is_exported=is_exported)
        lowering = mlir.lower_fun(in_pieces, multiple_results=True)
        return lowering(context, *arguments, **parameters)

    return lower


for primitive, at_once, in_pieces in (
    (_filter_p, _filter_at_once, _filter_in_pieces),
    (_filter_over_p, _filter_over_at_once, _filter_over_in_pieces),
    (_pushforward_p, _pushforward, _pushforward_in_pieces),
    (_image_and_pushforward_p, _pushforward, _pushforward_in_pieces),
    (_pullback_p, _pullback, _pullback_in_pieces),
):
    mlir.register_lowering(primitive, mlir.lower_fun(at_once, multiple_results=True))
    mlir.register_lowering(primitive, _lowering_in_pieces(in_pieces), platform="cpu")

"""Networks as functions of their weights: outputs, norm statistics and noise of given values."""

import contextlib
import re
from collections.abc import Iterator

import keras
import tensorflow as tf

from maml.errors import UserError
from maml.networks.exchanged import Exchanged
from maml.networks.layers import batch_statistics

Weights = list[tf.Tensor]


class Stateless:
    """A built Keras network, called with weights that are given as values and never assigned.

    TensorFlow differentiates through such a call any number of times.
    """

    def __init__(self, network: keras.Model):
        """Wraps the network, whose variables stay as they are."""
        self.network = network
        layers = network._flatten_layers()  # also those inside other layers, which `layers` lacks
        self._seeds = [v for v in network.non_trainable_variables if v.name == "seed_generator_state"]
        self._recurrent = [layer for layer in layers if hasattr(layer, "use_cudnn")]
        self._exchanged = Exchanged(network)
        # Variables that a call may change: noise, and what maml's own layers keep of a batch.
        self._kept = {id(seed) for seed in self._seeds}
        for layer in network._flatten_layers():
            if type(layer).__module__.split(".")[0] == "maml":
                self._kept |= {id(variable) for variable in layer.non_trainable_variables}

    def outputs(
        self,
        weights: Weights,
        x: tf.Tensor,
        support_x: tf.Tensor | None = None,
        noise: int | None = None,
    ) -> tf.Tensor:
        """The network's outputs [n, outputs] on inputs x [n, …], with the given weights.

        Batch norm takes the statistics of x itself or, where it is given, of `support_x` [m, …].
        Dropout and other noise is off unless `noise` numbers the draw: a number draws the same for every
        task of a meta-batch, and other noise after every update of the weights.

        The outputs carry what Keras knows of them: the mask, and the sum of `add_loss` and regularizers of
        this call, which `added_losses` reads.

        Raises:
            UserError: if the call changes a variable, as moving averages do.
        """
        if support_x is None:
            return self.by_batch(weights, x, noise)[0]
        state = self.state_after(weights, support_x)
        return self._call(weights, state, x, training=False)[0]

    def state_after(self, weights: Weights, x: tf.Tensor) -> Weights:
        """The network's non-trainable values with the batch-norm statistics of x [n, …]."""
        return self.by_batch(weights, x)[1]

    def by_batch(
        self, weights: Weights, x: tf.Tensor, noise: int | None = None, state: Weights | None = None
    ) -> tuple[tf.Tensor, Weights]:
        """Outputs [n, outputs] by the statistics of x [n, …], and the non-trainable values thereafter.

        With `noise`, see `outputs`, the layers are in training: moving statistics take a step. They start
        from `state`, or from the network's values.
        """
        variables = self.network.non_trainable_variables
        state = [variable.value for variable in variables] if state is None else state
        if noise is not None and self._seeds:
            seeds = {id(seed) for seed in self._seeds}
            state = [
                _folded(variable, noise + 1) if id(variable) in seeds else value
                for variable, value in zip(variables, state, strict=True)
            ]
        with batch_statistics():
            return self._call(weights, state, x, training=noise is not None)

    def constrained(self, weights: Weights, stepped: list[bool]) -> Weights:
        """After a step of some of the weights: these as their variables' constraints have them."""
        return [
            variable.constraint(value) if moved and variable.constraint is not None else value
            for variable, value, moved in zip(self.network.trainable_variables, weights, stepped, strict=True)
        ]

    def renew_noise(self) -> None:
        """Makes the next draws of every number other ones."""
        for seed in self._seeds:
            seed.assign(_folded(seed, 0))

    def _call(
        self, weights: Weights, state: Weights, x: tf.Tensor, *, training: bool
    ) -> tuple[tf.Tensor, Weights]:
        """The outputs, and the non-trainable values after the call."""
        network = self.network
        given = [
            *zip(network.trainable_variables, weights, strict=True),
            *zip(network.non_trainable_variables, state, strict=True),
        ]
        with (
            keras.StatelessScope(state_mapping=given, collect_losses=True) as scope,
            self._without_cudnn(),
            self._exchanged.where_asked(),
        ):
            before = dict(scope.state_mapping)
            # The network itself, not its `call`, which may have no argument `training`.
            outputs = network(x, training=training)
            # Read here, and not from `network.losses`, which tells layers' losses apart by the ids of
            # tensors: after some traces ids repeat, and a loss would count twice.
            losses = [*scope.losses, *_regularization(network, scope)]
        self._check_unchanged(before, scope)
        if losses:
            total = tf.add_n([tf.reduce_sum(tf.cast(loss, self._dtype)) for loss in losses])
            tf.nest.flatten(outputs)[0]._added_losses = total
        return outputs, [scope.get_current_value(v) for v in network.non_trainable_variables]

    @property
    def _dtype(self) -> tf.DType:
        return tf.as_dtype(self.network.trainable_variables[0].dtype)

    def _check_unchanged(self, before: dict[int, tf.Tensor], scope: keras.StatelessScope) -> None:
        for variable in self.network.non_trainable_variables:
            changed = scope.state_mapping[id(variable)] is not before[id(variable)]
            if changed and id(variable) not in self._kept:
                raise UserError(
                    f"{variable.path}: expected a variable that calls do not change, got one that they do, "
                    f"as moving averages. Tasks share no state: compute it from the batch at hand, or freeze "
                    f"the layer (trainable = False) if it then stops."
                )

    @contextlib.contextmanager
    def _without_cudnn(self) -> Iterator[None]:
        """Has LSTM and GRU compute step by step on a GPU too: their cuDNN kernel has no second derivative."""
        before = [layer.use_cudnn for layer in self._recurrent]
        for layer in self._recurrent:
            layer.use_cudnn = False
        try:
            yield
        finally:
            for layer, value in zip(self._recurrent, before, strict=True):
                layer.use_cudnn = value


def added_losses(outputs: tf.Tensor) -> tf.Tensor | None:
    """The sum of `add_loss` and regularizers in the call that gave these outputs; None: there are none."""
    return getattr(tf.nest.flatten(outputs)[0], "_added_losses", None)


def _regularization(network: keras.Model, scope: keras.StatelessScope) -> list[tf.Tensor]:
    """Losses of the trainable weights' regularizers, as Keras takes them."""
    return [
        variable.regularizer(scope.get_current_value(variable))
        for variable in network.trainable_variables
        if getattr(variable, "regularizer", None) is not None
    ]


def gradients(tape: tf.GradientTape, loss: tf.Tensor, weights: Weights) -> Weights:
    """The gradients in the weights, dense: an embedding's come as slices, which cannot be stepped along."""
    return [tf.convert_to_tensor(g) for g in tape.gradient(loss, weights, unconnected_gradients="zero")]


def takes_integers(network: keras.Model) -> bool:
    """Whether inputs go in as they are: one is of an integer type, or a custom class does not tell.

    Keras itself casts floating inputs to the type of a layer, and never integers.
    """
    inputs = getattr(network, "inputs", None)
    return inputs is None or any(tf.as_dtype(x.dtype).is_integer for x in inputs)


def tensors_of(network: keras.Model, side: str) -> object:
    """The symbolic "input" or "output" of a network, a structure where it has several; None: not known."""
    tensors = getattr(network, f"{side}s", None)
    if tensors is None:
        return None
    return tensors[0] if isinstance(network, keras.Sequential) else getattr(network, side)


def adapted_weights(network: keras.Model, adapt: str = "all") -> list[bool]:
    """For each trainable variable of the network, whether the inner loop adapts it.

    Args:
        network: a layer opts out for all its variables with an attribute `adapted = False`, of its class or
            its own.
        adapt: "all": all that do not opt out; "head": of these the weights of the last layer that has some;
            "body": the others. Anything else is a regular expression, and the weights are adapted in whose
            name, as "conv1/kernel", it is found, even those that opt out: ".*" adapts every weight.

    Raises:
        UserError: if that is no weight, or not a regular expression.
    """
    if adapt in ("all", "head", "body"):
        opted_out = {
            id(variable)
            for layer in network._flatten_layers()  # also those inside other layers, which `layers` lacks
            if not getattr(layer, "adapted", True)
            for variable in layer.trainable_variables
        }
        head = {id(variable) for variable in head_of(network).trainable_variables}
        wanted = {"all": lambda v: True, "head": lambda v: v in head, "body": lambda v: v not in head}[adapt]
        chosen = [id(v) not in opted_out and wanted(id(v)) for v in network.trainable_variables]
    else:
        try:
            chosen = [bool(re.search(adapt, name)) for name in weight_names(network)]
        except re.error as error:
            raise UserError(
                f"adapt: expected head, body, all or a regular expression, got {adapt!r} ({error})."
            ) from error
    if not any(chosen):
        raise UserError(
            f"adapt: expected a choice of some weights, got {adapt!r}, which chooses none of "
            f"{', '.join(weight_names(network))}."
        )
    return chosen


def weight_names(network: keras.Model) -> list[str]:
    """Names of the trainable variables, as "conv1/kernel"."""
    return [v.path.removeprefix(f"{network.name}/") for v in network.trainable_variables]


def head_of(network: keras.Model) -> keras.layers.Layer:
    """The last layer that has weights."""
    layers = [layer for layer in network._flatten_layers(include_self=False) if layer.trainable_variables]
    last = network.trainable_variables[-1]
    # The innermost: a model inside the network has its layers' weights too.
    holders = [layer for layer in layers if any(v is last for v in layer.trainable_variables)]
    return min(holders, key=lambda layer: len(layer.trainable_variables), default=network)


def backbone_of(network: keras.Model) -> keras.Model:
    """The network without its head, its weights shared: from inputs to what the head sees.

    Raises:
        UserError: if it is no Sequential or functional model whose last layer with weights is its head.
    """
    head = head_of(network)
    if network.layers[-1] is not head or not getattr(network, "inputs", None):
        raise UserError(
            f"expected a Sequential or functional model that ends with its head, got {network.name!r}, which "
            f"ends with {network.layers[-1].name!r}."
        )
    return keras.Model(network.inputs, head.input, name=f"{network.name}_backbone")


def _folded(seed: keras.Variable, number: int) -> tf.Tensor:
    """A seed as unlike the given one as one drawn at random, and for every number another."""
    folded = tf.random.experimental.stateless_fold_in(
        tf.cast(seed.value, tf.int64), tf.constant(number, tf.int64)
    )
    return tf.cast(folded, seed.dtype)

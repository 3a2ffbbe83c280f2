"""The command line: `ddray <verb>`.

A verb's flags are the keys of its config. Handlers import what they need, so `ddray --help` is
instant.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn, TypeVar

from ddray import __version__
from ddray.errors import ConfigError, DDRayError
from ddray.report.terminal import print_json, print_yaml

T = TypeVar("T")

# verb: (config "module:class" in ddray.config, handler "module:function", one line)
_JOBS = {
    "quickstart": (
        "quickstart:QuickstartConfig",
        "ddray.cli:_quickstart",
        "distil the bundled teacher on this machine, with a report",
    ),
    "sample": (
        "sampling:SampleConfig",
        "ddray.cli:_sample",
        "fill a trajectory set from a teacher (Ray Data)",
    ),
    "encode": (
        "encoding:EncodeConfig",
        "ddray.cli:_encode",
        "features of captions, for sets that are made of them again",
    ),
    "distill": (
        "distillation:DistillConfig",
        "ddray.cli:_distill",
        "train a student on a trajectory set (Ray Train + DeepSpeed)",
    ),
    "generate": (
        "generation:GenerateConfig",
        "ddray.cli:_generate",
        "images in bulk from a student",
    ),
    "evaluate": (
        "evaluation:EvaluateConfig",
        "ddray.cli:_evaluate",
        "a student beside its teacher",
    ),
    "reference": (
        "reference:ReferenceConfig",
        "ddray.cli:_reference",
        "statistics of real images, for `evaluate`",
    ),
    "serve": (
        "serving:ServeConfig",
        "ddray.cli:_serve",
        "a student behind HTTP (Ray Serve)",
    ),
    "doctor": (
        "doctor:DoctorConfig",
        "ddray.cli:_doctor",
        "what is wrong with this cluster, if anything",
    ),
}


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as everything else is reported: in one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _parser(whole: bool = False) -> argparse.ArgumentParser:
    """All verbs; the flags of jobs only if the parser is to be `whole`."""
    parser = _Parser(
        prog="ddray",
        description="Distilled Decoding: an autoregressive image model becomes a one-step "
        "generator. What makes or judges images runs without flags, on the bundled digits models.",
    )
    parser.add_argument("--version", action="version", version=f"ddray {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (_, _, line) in _JOBS.items():
        # Filled in when the verb is chosen: its flags come from its config class.
        stub = verbs.add_parser(verb, help=line, add_help=whole)
        if whole:
            _add_job(stub, verb)
    _add_inspect(verbs.add_parser("inspect", help="what a set holds, and whether it is whole"))
    _add_models(verbs.add_parser("models", help="models that ddray knows by name"))
    _add_cluster(verbs.add_parser("cluster", help="files of clusters, jobs that outlive a head"))
    export = verbs.add_parser(
        "export", help="weights in the container of published files, or as a model folder"
    )
    export.add_argument("--student", required=True, help="name or model folder, of a teacher too")
    export.add_argument("--checkpoint", help="file of the network, where the name brings none")
    export.add_argument("--tokenizer", help="file of the tokenizer, likewise")
    export.add_argument("--out", required=True, help="file to write, or for ddray a folder")
    export.add_argument(
        "--layout", choices=["upstream", "ddray"], default="upstream", help="default: upstream"
    )
    completion = verbs.add_parser("completion", help="what makes a shell complete verbs and flags")
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("uri", help="URI of the set")
    parser.add_argument("--picture", metavar="FILE.png", help="draw random rows into a picture")
    parser.add_argument("--verify", action="store_true", help="read every shard and check it")
    parser.add_argument(
        "--recompute",
        metavar="N",
        type=int,
        help="with --verify: compare at least N random trajectories with what the teacher makes of "
        "them now (default: 100, or none where the teacher is not at hand; 0 = none)",
    )
    parser.add_argument(
        "--repair", action="store_true", help="move bad shards to quarantine/ and refill the gaps"
    )
    parser.add_argument(
        "--workers", metavar="MIN:MAX", help="with --repair: actors that refill (default: 1:1)"
    )
    parser.add_argument(
        "--num-gpus", metavar="X", help="with --repair: GPUs of an actor (default: 0)"
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(action="list")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="names, one a line (the default)")
    show = actions.add_parser("show", help="sizes, files, and how to sample it")
    show.add_argument("name", help="name or model folder")
    verify = actions.add_parser("verify", help="check files against a model and run it once")
    verify.add_argument("name", help="name or model folder")
    verify.add_argument("--checkpoint", help="file of the network")
    verify.add_argument("--tokenizer", help="file of the tokenizer")


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    config = actions.add_parser(
        "config",
        help="write a copy of ray-cluster.yaml, cluster/ and jobs/ with the names of yours",
    )
    config.add_argument("--bucket", required=True, help="name of your bucket, without s3://")
    config.add_argument(
        "--registry", required=True, help="where you push images to: what goes before /ddray"
    )
    config.add_argument("--region", required=True, help="of AWS, such as eu-central-1")
    config.add_argument("--out", required=True, help="folder to write: a new one, or empty")
    config.add_argument(
        "--account", help="of AWS, twelve digits (default: the registry's, if it is Amazon's)"
    )
    config.add_argument(
        "--tag",
        default=__version__,
        help=f"of the images; -cpu is added to the one without a GPU (default: {__version__})",
    )
    submit = actions.add_parser(
        "submit",
        help="a job to the cluster at RAY_ADDRESS, and again whenever it is lost with its head",
    )
    submit.add_argument("--submission-id", required=True, help="name of the job")
    submit.add_argument("--working-dir", required=True, help="folder that goes with it")
    submit.add_argument(
        "--most-lost", type=int, default=10, help="how often it may be lost (default: 10)"
    )
    submit.add_argument("entrypoint", nargs="+", help="the command, after --")


def _config_class(verb: str) -> Any:
    module, _, name = _JOBS[verb][0].partition(":")
    return getattr(import_module(f"ddray.config.{module}"), name)


def _job_parser(verb: str) -> argparse.ArgumentParser:
    """Flags of a job: one for every key of its config, and the common ones."""
    from ddray.config.flags import description_of

    kind = _config_class(verb)
    parser = _Parser(
        prog=f"ddray {verb}",
        usage=f"ddray {verb} {f'{kind.POSITIONAL.upper()} ' if kind.POSITIONAL else ''}[flags]",
        description=description_of(kind),
        epilog="Order: preset < --config FILE < --set < flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_job(parser, verb)
    return parser


def _add_job(parser: argparse.ArgumentParser, verb: str) -> None:
    from ddray.config.flags import add_flags

    parser.add_argument(
        "--preset",
        default="default",
        metavar="{default,tiny}",
        help="values by name (default: default)",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with keys of the config")
    parser.add_argument(
        "--set",
        metavar="KEY.PATH=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="set any key; may be repeated",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and the cost, do nothing"
    )
    if verb == "evaluate":
        parser.add_argument(
            "--compare",
            nargs="+",
            metavar="SUMMARY",
            help="put two summary.json, or folders that hold one, side by side; with --out, on a "
            "page too; nothing is evaluated",
        )
    add_flags(parser, _config_class(verb))


def _parsed(verb: str, argv: Sequence[str]) -> argparse.Namespace:
    from ddray.config.flags import refuse_moved_flags

    refuse_moved_flags(_config_class(verb), argv)
    return _job_parser(verb).parse_args(argv)


def _resolve(verb: str, arguments: argparse.Namespace) -> Any:
    """The config that a command line comes to."""
    from ddray.config.flags import given_values
    from ddray.config.loading import load_config
    from ddray.config.presets import preset

    return load_config(
        _config_class(verb),
        preset=preset(verb, arguments.preset),
        file=arguments.config,
        settings=arguments.settings,
        flags=given_values(arguments),
    )


def _quickstart(config: Any) -> None:
    from ddray.runtime.quickstart import quickstart

    quickstart(config)


def _apart_from_ray(work: Callable[[], T]) -> T:
    """Do the work; Ray tells of lost workers on stdout, which is for the result alone."""
    with contextlib.redirect_stdout(sys.stderr):
        return work()


def _sample(config: Any) -> None:
    from ddray.runtime.pools.sampling import sample

    print_json(_apart_from_ray(lambda: sample(config)))


def _encode(config: Any) -> None:
    from ddray.runtime.pools.encoding import encode

    print_json(_apart_from_ray(lambda: encode(config)))


def _distill(config: Any) -> None:
    from ddray.runtime.training.driver import distill

    print_json(_apart_from_ray(lambda: distill(config)))


def _generate(config: Any) -> None:
    from ddray.runtime.pools.bulk import generate

    print_json(_apart_from_ray(lambda: generate(config)))


def _evaluate(config: Any) -> None:
    from ddray.runtime.evaluating import evaluate_and_report

    print(_apart_from_ray(lambda: evaluate_and_report(config)))


def _reference(config: Any) -> None:
    from ddray.runtime.referencing import reference

    print_json(_apart_from_ray(lambda: reference(config)))


def _compare(arguments: argparse.Namespace) -> None:
    from ddray.config.flags import given_values
    from ddray.evaluation.comparison import compare
    from ddray.locations import absolute

    comparison, out = compare(arguments.compare), given_values(arguments).get("out")
    print(comparison.as_text())
    if out:
        _require_lasting(out)
        print(f"\n{comparison.write(absolute(out))}")


def _serve(config: Any) -> None:
    from ddray.runtime.cluster.connection import connect
    from ddray.serving.api_keys import read_keys

    read_keys(config.api_keys_file)  # what is refused of them is refused before Ray starts
    try:
        with connect(config.metrics_port):
            # Ray Serve reads its environment when it is imported, so Ray comes first.
            from ddray.runtime.serving.app import serve_students

            serve_students(config)
    except SystemExit as end:  # by a signal
        # All is written, and to take torch apart needs seconds where others compute.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(end.code or 0))


def _doctor(config: Any) -> int:
    from ddray.runtime.cluster.doctor import doctor

    lines, well = doctor(config)
    print("\n".join(lines))
    return 0 if well else 1


def _models(arguments: argparse.Namespace) -> None:
    if arguments.action in (None, "list"):
        from ddray.models.catalog import BUNDLED_MODELS, PUBLISHED

        for name, line in BUNDLED_MODELS.items():
            print(f"{name:22}{line} (bundled)")
        for name, published in PUBLISHED.items():
            print(f"{name:22}{published.kind}; {published.figure}")
        return
    from ddray.models.published import describe, verify

    if arguments.action == "show":
        print_yaml(describe(arguments.name), width=100)
    else:
        print_json(verify(arguments.name, arguments.checkpoint, arguments.tokenizer))


def _cluster(arguments: argparse.Namespace) -> None:
    if arguments.action == "submit":
        from ddray.runtime.cluster.submission import submit

        submit(
            arguments.entrypoint,
            arguments.submission_id,
            arguments.working_dir,
            arguments.most_lost,
        )
        return
    from ddray.runtime.cluster.deployment import write_config

    print_json(
        write_config(
            arguments.bucket,
            arguments.registry,
            arguments.region,
            arguments.out,
            arguments.account,
            arguments.tag,
        )
    )


def _export(arguments: argparse.Namespace) -> None:
    from ddray.models.published import export

    print_json(
        export(
            arguments.student,
            arguments.out,
            arguments.layout,
            arguments.checkpoint,
            arguments.tokenizer,
        )
    )


def _completion(arguments: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError as error:
        raise ConfigError("completion needs the package shtab; install it") from error

    from ddray.config.flags import show_to_shells

    print(shtab.complete(show_to_shells(_parser(whole=True)), arguments.shell))


def _dry_run(verb: str, config: Any) -> None:
    values = config.model_dump(mode="json")
    if verb == "quickstart":
        from ddray.runtime.quickstart import parts

        # As they will run: with the quickstart's teacher, seed and folder put in.
        jobs = ("sample", "distill", "generate", "evaluate")
        values |= {
            name: job.model_dump(mode="json") for name, job in zip(jobs, parts(config), strict=True)
        }
    print_yaml(values)
    # As comments: what is printed can go back in by --config.
    for key, value in _cost(verb, config).items():
        print(f"# {key}: {value}")


def _cost(verb: str, config: Any) -> dict[str, Any]:
    """What a job will write or take, as far as that is known before it runs."""
    if verb == "doctor":
        return {"cost": "none; a file of a few bytes is written to every uri, and deleted"}
    if verb == "reference":
        from ddray.evaluation.reference_making import estimate

        return estimate(config)
    if verb != "quickstart":
        told: dict[str, Any] = getattr(import_module("ddray.cost"), f"estimate_{verb}")(config)
        return told
    from ddray.cost import estimate_distill, estimate_sample
    from ddray.runtime.quickstart import parts

    sampling, distilling, generating, evaluating = parts(config)
    costs = {"sample": estimate_sample(sampling), "distill": estimate_distill(distilling)}
    counts: dict[str, dict[str, Any]] = {"generate": {"images": generating.count}}
    counts |= {"evaluate": {"images": evaluating.num_images}}
    return {
        f"{part}.{key}": value
        for part, told in (costs | counts).items()
        for key, value in told.items()
    }


def _require_lasting(out: str) -> None:
    """Refuse results in the folder that Ray has unpacked for a job, and deletes after it."""
    if "/runtime_resources/working_dir_files/" in out and not out.startswith("s3://"):
        raise ConfigError(
            f"out={out!r} lies in the working directory, which Ray deletes after the job; give a "
            "full path that all nodes share, or s3://"
        )


def _handler(target: str) -> Callable[[Any], int | None]:
    module, _, function = target.partition(":")
    handler: Callable[[Any], int | None] = getattr(import_module(module), function)
    return handler


def _run(argv: Sequence[str]) -> int:
    if not argv:
        _parser().print_help()
        return ConfigError.exit_code
    arguments, rest = _parser().parse_known_args(argv)
    verb = arguments.verb
    if verb not in _JOBS:
        if rest:
            _parser().error(f"unrecognized arguments: {' '.join(rest)}")
        others = {
            "models": _models,
            "cluster": _cluster,
            "export": _export,
            "completion": _completion,
        }
        if verb == "inspect":
            from ddray.runtime.inspecting import inspect

            return inspect(arguments)
        others[verb](arguments)
        return 0
    arguments = _parsed(verb, rest)
    if getattr(arguments, "compare", None):
        _compare(arguments)
        return 0
    config = _resolve(verb, arguments)
    if arguments.dry_run:
        _dry_run(verb, config)
        return 0
    _require_lasting(getattr(config, "out", "/"))
    return _handler(_JOBS[verb][1])(config) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit status: 0 done, 1 failed, 2 wrong usage or config, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = _run(argv)
    except DDRayError as error:
        print(f"ddray: error: {error}", file=sys.stderr)
        return ConfigError.exit_code if isinstance(error, ConfigError) else error.exit_code
    except KeyboardInterrupt:
        advice = "" if argv[:1] == ["serve"] else "; a rerun goes on from what is written"
        print(f"ddray: interrupted{advice}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

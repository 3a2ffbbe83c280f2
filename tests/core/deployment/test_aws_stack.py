"""The stack of cluster/aws: valid, made in moto, and what the files for `ray up` ask for.

Ray starts its machines in moto, too, in a process of its own: core tests import no Ray.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from ddray.runtime.cluster.deployment import write_config
from tests.core.deployment.cloudformation import STACK, resources, statements, template
from tests.paths import ROOT
from tests.s3_server import s3_environment

ON_AWS = ("ray-cluster.yaml", "cluster/aws-single.yaml")
REGION = "eu-west-1"
PARAMETERS = {
    "Bucket": "mine-of-the-stack",
    "SshFrom": "203.0.113.7/32",
    "BudgetEmail": "me@example.org",
}

# What moto does not make; of these only cfn-lint has seen the inside.
NOT_IN_MOTO = {"DataOverTls", "AmongNodesOut", "SpotServiceRole", "Alarm"}
pytestmark = pytest.mark.filterwarnings("ignore:Tried to parse AWS")

# What `ray up` does up to the first ssh, and its autoscaler for each pool.
START = """
import json, sys
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
for config in json.load(sys.stdin):
    config = prepare_config(config)
    validate_config(config)
    config = bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for name, kind in config["available_node_types"].items():
        provider.create_node(kind["node_config"], {"ray-user-node-type": name}, 1)
"""


def node_configs(folder: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Of every type of node of both files."""
    files = [yaml.safe_load((folder / name).read_text("utf-8")) for name in ON_AWS]
    return {
        name: kind["node_config"]
        for file in files
        for name, kind in file["available_node_types"].items()
    }


# Names


def test_what_the_files_for_ray_up_name_is_what_the_stack_makes() -> None:
    profiles = {one["InstanceProfileName"] for one in resources("IAM::InstanceProfile").values()}
    named = {config["IamInstanceProfile"]["Name"] for config in node_configs().values()}
    assert named == profiles
    templates = {one["LaunchTemplateName"] for one in resources("EC2::LaunchTemplate").values()}
    launched = {
        config["LaunchTemplate"]["LaunchTemplateName"] for config in node_configs().values()
    }
    assert launched == templates
    # A profile is passed by its role's name.
    for profile in resources("IAM::InstanceProfile").values():
        (role,) = profile["Roles"]
        assert resources("IAM::Role")[role["Ref"]]["RoleName"] == profile["InstanceProfileName"]
    (repository,) = resources("ECR::Repository").values()
    assert repository["RepositoryName"] == "ddray"


def test_the_tag_without_which_nothing_starts_is_the_name_of_a_cluster() -> None:
    names = [yaml.safe_load((ROOT / name).read_text("utf-8"))["cluster_name"] for name in ON_AWS]
    told = [
        condition["StringEquals"][key]
        for statement in policy("LaunchesNodes")
        for condition in [statement.get("Condition", {"StringEquals": {}})]
        for key in condition["StringEquals"]
        if key.endswith("ray-cluster-name")
    ]
    assert told == [names, names]


# Rights


def policy(name: str) -> list[dict[str, Any]]:
    return statements(resources("IAM::ManagedPolicy")[name]["PolicyDocument"])


def actions(name: str) -> set[str]:
    return {action for statement in policy(name) for action in statement["Action"]}


def test_who_may_do_what() -> None:
    roles = {
        role["RoleName"]: [one["Ref"] for one in role["ManagedPolicyArns"]]
        for role in resources("IAM::Role").values()
    }
    assert roles == {
        "ddray-head": ["LaunchesNodes", "PullsImages", "WritesData"],
        "ddray-worker": ["PullsImages", "WritesData"],
        "ddray-serving-node": ["PullsImages", "ReadsData"],
        "ddray-single": ["PullsImages", "WritesData"],
    }
    for role in resources("IAM::Role").values():
        (trusted,) = role["AssumeRolePolicyDocument"]["Statement"]
        assert trusted["Principal"] == {"Service": "ec2.amazonaws.com"}
    assert actions("ReadsData") == {"s3:ListBucket", "s3:GetObject"}
    assert actions("PullsImages") == {
        "ecr:GetAuthorizationToken", "ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage",
        "ecr:GetDownloadUrlForLayer",
    }  # fmt: skip
    assert actions("LaunchesNodes") == {
        "ec2:DescribeInstances", "ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances",
        "ssm:GetParameters", "iam:PassRole",
    }  # fmt: skip


def test_no_right_is_wider_than_its_service_has_it() -> None:
    documents = [one["PolicyDocument"] for one in resources("IAM::ManagedPolicy").values()]
    for role in resources("IAM::Role").values():
        documents += [one["PolicyDocument"] for one in role.get("Policies", [])]
    everywhere = set()
    for statement in [one for document in documents for one in statements(document)]:
        assert statement["Effect"] == "Allow"
        assert not [action for action in statement["Action"] if "*" in action]
        if "*" in statement["Resource"]:
            everywhere |= set(statement["Action"])
        if "iam:PassRole" in statement["Action"]:
            assert all("Fn::GetAtt" in role for role in statement["Resource"])
            assert statement["Condition"]["StringEquals"] == {
                "iam:PassedToService": "ec2.amazonaws.com"
            }
    narrow = {one for one in everywhere if not one.startswith("ec2:Describe")}
    assert narrow == {"ecr:GetAuthorizationToken"}
    # And the head passes no role that launches.
    passed = [one["Resource"] for one in policy("LaunchesNodes") if "iam:PassRole" in one["Action"]]
    assert passed == [[{"Fn::GetAtt": "WorkerRole.Arn"}, {"Fn::GetAtt": "ServingRole.Arn"}]]


def test_the_bucket_is_closed_and_forgets_uploads_that_were_not_finished() -> None:
    (bucket,) = resources("S3::Bucket").values()
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    (rule,) = bucket["LifecycleConfiguration"]["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    assert template()["Resources"]["Data"]["DeletionPolicy"] == "Retain"


def test_nobody_but_who_runs_ray_up_gets_in() -> None:
    (group,) = resources("EC2::SecurityGroup").values()
    (rule,) = group["SecurityGroupIngress"]
    assert (rule["FromPort"], rule["ToPort"], rule["CidrIp"]) == (22, 22, {"Ref": "SshFrom"})
    allowed = template()["Parameters"]["SshFrom"]["AllowedPattern"]
    assert re.fullmatch(allowed, PARAMETERS["SshFrom"])
    assert not re.fullmatch(allowed, "0.0.0.0/0")


def test_efa_is_a_card_of_its_own_for_each_interface_in_one_subnet_and_group() -> None:
    data = resources("EC2::LaunchTemplate")["TrainingMachine"]["LaunchTemplateData"]
    condition, cards, otherwise = data["NetworkInterfaces"]["Fn::If"]
    assert (condition, otherwise) == ("HasEfa", {"Ref": "AWS::NoValue"})
    assert [card["NetworkCardIndex"] for card in cards] == [*range(32)]
    # Only the first card has the machine's primary interface.
    assert [card["DeviceIndex"] for card in cards] == [0] + [1] * 31
    assert {card["InterfaceType"] for card in cards} == {"efa"}
    assert all(card["SubnetId"] == {"Ref": "EfaSubnet"} for card in cards)
    assert all(card["Groups"] == [{"Fn::GetAtt": "Nodes.GroupId"}] for card in cards)


# By others' judgement


def cfn_lint(text: str) -> str:
    command = [Path(sys.executable).with_name("cfn-lint"), "--regions", "us-west-2"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.slow
def test_cfn_lint_has_nothing_to_say() -> None:
    right = STACK.read_text("utf-8")
    assert cfn_lint(right) == ""
    assert "'AES257' is not one of" in cfn_lint(
        right.replace("SSEAlgorithm: AES256", "SSEAlgorithm: AES257")
    )


@pytest.fixture(scope="module")
def account(s3_service: str) -> Iterator[str]:
    """The endpoint of an account at moto, to which the environment points."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in (s3_environment(s3_service) | {"AWS_DEFAULT_REGION": REGION}).items():
            environment.setenv(name, value)
        yield s3_service


def client(service: str) -> Any:
    return boto3.session.Session().client(service)


def default_network() -> str:
    filters = [{"Name": "is-default", "Values": ["true"]}]
    (network,) = client("ec2").describe_vpcs(Filters=filters)["Vpcs"]
    return network["VpcId"]


def deploy(verb: str, **more: str) -> None:
    values = PARAMETERS | {"Vpc": default_network()} | more
    getattr(client("cloudformation"), f"{verb}_stack")(
        StackName="ddray",
        TemplateBody=STACK.read_text("utf-8"),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in values.items()],
    )


@pytest.fixture(scope="module")
def stack(account: str) -> Iterator[dict[str, str]]:
    """The outputs of the stack, made in moto."""
    deploy("create")
    (made,) = client("cloudformation").describe_stacks(StackName="ddray")["Stacks"]
    assert made["StackStatus"] == "CREATE_COMPLETE"
    listed = client("cloudformation").list_stack_resources(StackName="ddray")
    there = {one["LogicalResourceId"] for one in listed["StackResourceSummaries"]}
    asked = template()["Resources"].items()
    wanted = {name for name, one in asked if one.get("Condition") in (None, "MakesSpotRole")}
    assert wanted - there == NOT_IN_MOTO
    yield {one["OutputKey"]: one["OutputValue"] for one in made["Outputs"]}
    client("cloudformation").delete_stack(StackName="ddray")


@pytest.fixture(scope="module")
def own_files(stack: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes that the stack tells its reader to type."""
    words = stack["Config"].split()
    assert words[:3] == ["ddray", "cluster", "config"]
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    out = tmp_path_factory.mktemp("own") / flags["--out"]
    write_config(flags["--bucket"], flags["--registry"], flags["--region"], str(out))
    return out


def start(*configs: dict[str, Any], home: Path) -> subprocess.CompletedProcess[str]:
    """Ray keeps the key that it makes in the home folder."""
    return subprocess.run(
        [sys.executable, "-c", START],
        input=json.dumps(configs),
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def running(*clusters: str) -> dict[str, dict[str, Any]]:
    """Machines of EC2 in these clusters, by the type of node that Ray started them as."""
    filters = [{"Name": "tag:ray-cluster-name", "Values": [*clusters]}]
    found = {}
    for reservation in client("ec2").describe_instances(Filters=filters)["Reservations"]:
        for machine in reservation["Instances"]:
            tags = {tag["Key"]: tag["Value"] for tag in machine["Tags"]}
            found[tags["ray-user-node-type"]] = machine
    return found


@pytest.mark.slow
def test_without_the_stack_ray_starts_nothing_and_opens_nothing(
    account: str, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / "ray-cluster.yaml").read_text("utf-8"))
    done = start(config, home=tmp_path)
    assert done.returncode != 0
    assert "LaunchTemplate" in done.stderr and "NotFound" in done.stderr
    assert running("ddray") == {}
    groups = client("ec2").describe_security_groups()["SecurityGroups"]
    assert {group["GroupName"] for group in groups} == {"default"}


@pytest.mark.slow
def test_on_the_stack_ray_starts_a_machine_of_every_kind(own_files: Path, tmp_path: Path) -> None:
    configs = [yaml.safe_load((own_files / name).read_text("utf-8")) for name in ON_AWS]
    assert {config["provider"]["region"] for config in configs} == {REGION}
    done = start(*configs, home=tmp_path)
    assert done.returncode == 0, done.stderr
    found, wanted = running("ddray", "ddray-single"), node_configs(own_files)
    assert found.keys() == wanted.keys()
    for name, machine in found.items():
        profile = machine["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        assert profile == wanted[name]["IamInstanceProfile"]["Name"]
        assert machine["InstanceType"] == wanted[name]["InstanceType"]
        assert [group["GroupName"] for group in machine["SecurityGroups"]] == ["ddray"]
        market = wanted[name].get("InstanceMarketOptions", {}).get("MarketType")
        assert machine.get("InstanceLifecycle") == market
    (bucket,) = client("s3").get_bucket_encryption(Bucket=PARAMETERS["Bucket"])[
        "ServerSideEncryptionConfiguration"
    ]["Rules"]
    assert bucket["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "AES256"}


@pytest.mark.slow
def test_with_efa_and_a_block_only_training_machines_are_others(
    own_files: Path, tmp_path: Path
) -> None:
    subnet = client("ec2").describe_subnets()["Subnets"][0]["SubnetId"]
    deploy("update", EfaSubnet=subnet, CapacityBlock="cr-0123456789abcdef0")
    config = yaml.safe_load((own_files / "ray-cluster.yaml").read_text("utf-8"))
    config["cluster_name"] = "ddray-efa"
    done = start(config, home=tmp_path)
    assert done.returncode == 0, done.stderr
    # Two, since moto tells cards apart by their device's index, of which 31 have the same.
    cards = {name: one["NetworkInterfaces"] for name, one in running("ddray-efa").items()}
    assert {name: len(found) for name, found in cards.items()} == dict.fromkeys(cards, 1) | {
        "training": 2
    }
    assert {card["SubnetId"] for card in cards["training"]} == {subnet}
    for card in cards["training"]:
        assert [group["GroupName"] for group in card["Groups"]] == ["ddray"]

"""Facts about schedules: what a text means, and why another one is refused."""

import pytest

from ddray.errors import ConfigError
from ddray.method.schedule import TeacherStages, num_steps, parse_schedule


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ("0", (0,)),
        ((0,), (0,)),
        ([0, 4], (0, 4)),
        ("0,4", (0, 4)),
        (" 0 , 4 ", (0, 4)),
        ("0,1,2,7", (0, 1, 2, 7)),
        ("0,teacher:4-8", (0, TeacherStages(4, 8))),
        ("0,teacher:2-5,5", (0, TeacherStages(2, 5), 5)),
        ("teacher:0-5,5", (TeacherStages(0, 5), 5)),
        ((0, "teacher:2-5", 5), (0, TeacherStages(2, 5), 5)),
        ("0, teacher:2-3,3", (0, TeacherStages(2, 3), 3)),
        ("teacher:0-8", (TeacherStages(0, 8),)),
    ],
)
def test_a_schedule_reads_as(schedule, steps):
    assert parse_schedule(schedule, 8) == steps


def test_a_step_is_a_jump_or_one_stage_of_the_teacher():
    assert num_steps(parse_schedule("0", 8)) == 1
    assert num_steps(parse_schedule("0,4", 8)) == 2
    assert num_steps(parse_schedule("0,teacher:2-5,5", 8)) == 5
    assert num_steps(parse_schedule("teacher:0-8", 8)) == 8


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("0,8", "8 must be above the jump before it and below 8"),
        ("0,4,4", "4 must be above the jump before it"),
        ("0,4,2", "2 must be above the jump before it"),
        ("3", "begins at stage 3, but nothing has made the stages"),
        ("teacher:2-4,4", "begins at stage 2, but nothing has made the stages"),
        ("0,teacher:4-4,4", "teacher:4-4 must name stages in increasing order up to 8"),
        ("0,teacher:5-2,5", "teacher:5-2 must name stages in increasing order up to 8"),
        ("0,teacher:4-9", "teacher:4-9 must name stages in increasing order up to 8"),
        ("0,teacher:2-4,5", "after teacher:2-4 the student must jump at 4"),
        ("0,teacher:2-4,teacher:5-6", "after teacher:2-4 the student must jump at 4"),
        ("0,teacher:2-4", "behind teacher:2-4 nothing makes the stages up to 8"),
        ("0,x", "'x' is neither a stage number nor \"teacher:FIRST-LAST\""),
        ("0,teacher:4", "'teacher:4' is neither a stage number"),
        ("0,1.5", "'1.5' is neither a stage number"),
        ("0,,4", "'' is neither a stage number"),
        ("", "'' is neither a stage number"),
        ("-1", "'-1' is neither a stage number"),
        ((-1,), "stage -1 is negative"),
        ((0, 1.5), "1.5 is neither a stage number"),
        ((True,), "True is neither a stage number"),
    ],
)
def test_a_schedule_is_refused_with_its_reason(schedule, message):
    with pytest.raises(ConfigError, match="^schedule ") as caught:
        parse_schedule(schedule, 8)
    assert message in str(caught.value)


def test_an_empty_schedule_is_refused():
    with pytest.raises(ConfigError, match="schedule"):
        parse_schedule((), 8)


def test_a_teacher_may_not_go_back_behind_the_last_jump():
    with pytest.raises(ConfigError, match="schedule"):
        parse_schedule("0,6,teacher:2-4,4", 8)

from __future__ import annotations

import builtins
import functools
import pickle
import re
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dramatiq_policies import ConfigurationError, RetryPolicy, constant, when
from dramatiq_policies.rules.matching import RuleSet
from dramatiq_policies.rules.parsing import parse_rules
from dramatiq_policies.rules.rule import Verb

try:
    Group = builtins.ExceptionGroup
except AttributeError:
    # Python 3.10: pytest brings the backport.
    from exceptiongroup import ExceptionGroup as Group


class Base(Exception):
    pass


class Left(Base):
    pass


class Right(Base):
    pass


class Both(Left, Right):
    pass


class Deep(Both, OSError):
    pass


CLASSES = [BaseException, Exception, OSError, Base, Left, Right, Both, Deep]


def actor_rules(**declared):
    return parse_rules("actor 'mail'", "actor", **declared)


def broker_rules(**declared):
    return parse_rules("ErrorClassifier", "broker", **declared)


def verb_for(error, own=(), of_broker=()):
    rule = RuleSet(own, of_broker).match(error)
    return None if rule is None else rule.verb


# Forms.


def test_a_class_a_tuple_and_a_list_are_rules():
    for declared in (Left, (Left,), [Left], {Left}, ((Left,),)):
        (rule,) = actor_rules(discard_on=declared)
        assert (rule.verb, rule.target, rule.policy) == (Verb.DISCARD, Left, None)


def test_a_retry_rule_without_a_policy_has_the_default_one():
    (rule,) = actor_rules(retry_on=Left)
    assert rule.policy == RetryPolicy()
    assert rule.policy.attempts == 5


def test_a_mapping_gives_each_class_its_policy_or_number_of_attempts():
    left, right = actor_rules(retry_on={Left: RetryPolicy(attempts=2, wait=5), Right: 7})
    assert (left.policy.attempts, left.policy.wait(1, Left())) == (2, 5)
    assert right.policy.attempts == 7


def test_classes_of_one_key_share_a_counter_and_others_do_not():
    left, right, os_error = actor_rules(retry_on={(Left, Right): 3, OSError: 3})
    assert left.id == right.id != os_error.id


def test_a_shared_counters_name_does_not_depend_on_the_order_of_its_classes():
    names = {actor_rules(retry_on={key: 3})[0].id for key in ((Left, Right), (Right, Left), frozenset({Left, Right}))}
    assert len(names) == 1


def test_classes_that_share_no_key_have_their_own_counters():
    left, right = actor_rules(retry_on=(Left, Right))
    assert left.id != right.id


def test_a_rules_id_is_its_class_and_stays_when_others_come_and_go():
    alone = actor_rules(retry_on=Left)[0].id
    among = next(r.id for r in actor_rules(retry_on={Right: 2, Left: 9}, discard_on=OSError) if r.target is Left)
    assert alone == among == f"{__name__}.Left"


def test_two_lambdas_on_one_class_are_two_rules():
    ids = [r.id for r in actor_rules(retry_on=(when(Left, lambda e: True), when(Left, lambda e: False)))]
    assert len(set(ids)) == 2


def test_a_when_over_several_classes_with_one_policy_shares_a_counter():
    left, right = actor_rules(retry_on={when((Left, Right), lambda e: True): 2})
    assert left.id == right.id


def test_a_predicate_of_the_brokers_never_shares_its_counter_with_one_of_the_actors():
    (own,) = actor_rules(retry_on=when(Left, lambda e: False))
    (broker,) = broker_rules(retry_on=when(Left, lambda e: True))
    assert own.id != broker.id


def is_known(number, error):
    return bool(error.args)


def test_a_predicates_rule_is_named_by_its_class_and_its_function():
    known = when(Left, functools.partial(functools.partial(is_known, 1)))
    assert actor_rules(retry_on=known)[0].id == f"{__name__}.Left?is_known"
    assert broker_rules(retry_on=known)[0].id == f"{__name__}.Left??is_known"


def test_keys_that_look_alike_have_their_own_counters_though_they_share_a_policy():
    policy = RetryPolicy(attempts=2)

    def both(predicate):
        return when(Left, predicate), when(Right, predicate)

    ids = [r.id for r in actor_rules(retry_on={both(lambda e: True): policy, both(lambda e: False): policy})]
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_a_predicate_need_not_be_hashable():
    @dataclass
    class Says:
        word: str

        def __call__(self, error):
            return self.word in str(error)

    rules = actor_rules(retry_on={when(Left, Says("busy")): 3, when(Left, Says("full")): 2})
    assert RuleSet(rules).match(Left("disk full")).policy.attempts == 2


def test_the_broker_may_name_classes_by_dotted_path():
    error = ConnectionResetError()
    for path in ("ConnectionError", "builtins.ConnectionError", "builtins:ConnectionError"):
        assert verb_for(error, (), broker_rules(discard_on=path)) is Verb.DISCARD


@pytest.mark.parametrize(
    "path", ["no.such.module.Error", "builtins.NoSuchError", "builtins.print", "builtins.int", "", "..x", "a b"]
)
def test_a_dotted_path_that_leads_nowhere_is_a_configuration_error_at_first_use(path):
    (rule,) = broker_rules(alert_on=path)
    with pytest.raises(ConfigurationError, match=r"ErrorClassifier: alert_on: expected the dotted path"):
        rule.resolve()


def test_a_rule_with_a_dead_path_is_left_out_and_logged_and_the_others_count(caplog):
    rules = broker_rules(discard_on=("no.such.Error", ValueError))
    assert verb_for(ValueError(), (), rules) is Verb.DISCARD
    assert "A rule is ignored" in caplog.text


def test_two_spellings_of_one_path_under_two_verbs_are_a_configuration_error():
    with pytest.raises(ConfigurationError, match=r"alert_on: expected each class once, got 'builtins:OSError'"):
        broker_rules(retry_on="builtins.OSError", alert_on="builtins:OSError")


def test_paths_that_turn_out_to_be_one_class_under_two_verbs_are_a_configuration_error_when_resolved():
    rules = RuleSet((), broker_rules(retry_on=("builtins.IOError", LookupError), alert_on="builtins.OSError"))
    with pytest.raises(ConfigurationError, match=r"ErrorClassifier: alert_on: expected each class once"):
        rules.resolve()


def test_an_actor_and_the_broker_may_name_one_class():
    RuleSet(actor_rules(retry_on=Left), broker_rules(alert_on=Left)).resolve()


@pytest.mark.parametrize(
    ("declared", "advice"),
    [
        (Left("x"), "Name the class Left"),
        ("builtins.OSError", "Import the class"),
        (lambda e: True, "when(SomeError, function)"),
        ([{Left: 3}], "A mapping can't be combined"),
        (int, "subclass of Exception"),
        (5, "subclass of Exception"),
    ],
)
def test_the_error_of_a_rule_without_an_exception_class_shows_a_correct_rule(declared, advice):
    with pytest.raises(ConfigurationError) as caught:
        actor_rules(retry_on=declared)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("declared", "option"),
    [
        ({"retry_on": 5}, "retry_on"),
        ({"retry_on": "Left"}, "retry_on"),
        ({"retry_on": Left()}, "retry_on"),
        ({"retry_on": int}, "retry_on"),
        ({"retry_on": {Left: 0}}, "retry_on"),
        ({"retry_on": {Left: True}}, "retry_on"),
        ({"retry_on": {Left: None}}, "retry_on"),
        ({"retry_on": {5: 5}}, "retry_on"),
        ({"retry_on": {(): 5}}, "retry_on"),
        ({"retry_on": when((), bool)}, "retry_on"),
        ({"discard_on": {Left: 5}}, "discard_on"),
        ({"alert_on": [Left, "Right"]}, "alert_on"),
        ({"alert_on": when(int, bool)}, "alert_on"),
        ({"alert_on": when(when(Left, bool), bool)}, "alert_on"),
        ({"retry_on": Left, "discard_on": Left}, "discard_on"),
        ({"retry_on": {Left: 2}, "alert_on": (OSError, Left)}, "alert_on"),
    ],
)
def test_a_bad_rule_is_a_configuration_error_that_names_place_option_expected_and_got(declared, option):
    with pytest.raises(ConfigurationError, match=rf"actor 'mail': {option}: expected .*, got "):
        actor_rules(**declared)


async def admits_later(error):
    return True


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: RetryPolicy(attempts=0), "RetryPolicy: attempts"),
        (lambda: RetryPolicy(attempts=True), "RetryPolicy: attempts"),
        (lambda: RetryPolicy(attempts=2.5), "RetryPolicy: attempts"),
        (lambda: RetryPolicy(wait=-1), "RetryPolicy: wait"),
        (lambda: RetryPolicy(wait="soon"), "RetryPolicy: wait"),
        (lambda: RetryPolicy(wait=admits_later), "RetryPolicy: wait"),
        (lambda: RetryPolicy(wait=lambda attempt: 5), "RetryPolicy: wait"),
        (lambda: RetryPolicy(max_elapsed=-1), "RetryPolicy: max_elapsed"),
        (lambda: RetryPolicy(max_elapsed="1h"), "RetryPolicy: max_elapsed"),
        (lambda: RetryPolicy(then="retry"), "RetryPolicy: then"),
        (lambda: when(Left, None), "when(): predicate"),
        (lambda: when(Left, admits_later), "when(): predicate"),
        (lambda: when(Left, functools.partial(admits_later)), "when(): predicate"),
        (lambda: when(Left, lambda: True), "when(): predicate"),
        (lambda: when(Left, lambda error, status: True), "when(): predicate"),
    ],
)
def test_a_bad_policy_or_predicate_is_a_configuration_error_that_names_it(build, named):
    with pytest.raises(ConfigurationError, match=rf"^{re.escape(named)}: expected .*, got "):
        build()


def test_a_policy_takes_timedeltas_and_plain_milliseconds():
    policy = RetryPolicy(wait=timedelta(seconds=2), max_elapsed=timedelta(minutes=1))
    assert policy.wait == constant(2_000)
    assert policy.max_elapsed == 60_000


def test_a_predicate_without_a_signature_is_taken():
    class Odd:
        __signature__ = "(error)"

        def __call__(self, error):
            return True

    for predicate in (bool, attrgetter("args"), functools.partial(isinstance, Left()), Odd()):
        when(Left, predicate)


def test_a_predicate_is_judged_by_its_decorator_and_not_by_the_wrapped_function():
    def with_client(fn):
        @functools.wraps(fn)
        def wrapper(error):
            return fn(error, "client")

        return wrapper

    @with_client
    def is_known(error, client):
        return True

    assert verb_for(Left(), actor_rules(discard_on=when(Left, is_known))) is Verb.DISCARD


def test_policies_are_values_that_can_be_pickled():
    policy = RetryPolicy(attempts=3, wait=2_000, max_elapsed=60_000, then="alert")
    assert (
        pickle.loads(pickle.dumps(policy)) == policy == RetryPolicy(3, constant(2_000), timedelta(minutes=1), "alert")
    )


# Which one wins.


def test_an_error_without_a_declaration_has_no_rule():
    assert verb_for(KeyError(), actor_rules(retry_on=OSError)) is None
    assert verb_for(KeyError()) is None
    assert RuleSet().match_leaf(KeyError()) is None


def test_the_nearest_class_wins_over_a_wider_one_that_was_declared_first():
    rules = actor_rules(retry_on=OSError, discard_on=FileNotFoundError)
    assert verb_for(FileNotFoundError(), rules) is Verb.DISCARD
    assert verb_for(PermissionError(), rules) is Verb.RETRY


def test_a_brokers_rule_for_the_nearer_class_beats_the_actors_for_a_wider_one():
    own, broker = actor_rules(retry_on=OSError), broker_rules(alert_on=ConnectionError)
    assert verb_for(ConnectionResetError(), own, broker) is Verb.ALERT


def test_for_one_class_the_actors_rule_beats_the_brokers():
    own, broker = actor_rules(retry_on=OSError), broker_rules(alert_on=when(OSError, lambda e: True))
    assert verb_for(OSError(), own, broker) is Verb.RETRY


def test_for_one_class_a_when_that_holds_beats_the_bare_class():
    rules = actor_rules(retry_on=OSError, discard_on=when(OSError, lambda e: e.errno == 28))
    assert verb_for(OSError(28, "full"), rules) is Verb.DISCARD
    assert verb_for(OSError(5, "io"), rules) is Verb.RETRY


def test_a_when_on_a_wider_class_does_not_beat_the_bare_nearer_one():
    rules = actor_rules(discard_on=when(OSError, lambda e: True), retry_on=ConnectionError)
    assert verb_for(ConnectionResetError(), rules) is Verb.RETRY


def test_a_predicate_that_raises_does_not_match_and_is_logged(caplog):
    rules = actor_rules(discard_on=when(Base, lambda e: e.nothing), retry_on=Exception)
    assert verb_for(Left(), rules) is Verb.RETRY
    assert "does not match" in caplog.text
    assert "AttributeError" in caplog.text


def test_a_predicate_that_returns_a_coroutine_does_not_match(caplog):
    rules = actor_rules(discard_on=when(Base, lambda e: admits_later(e)), retry_on=Exception)  # noqa: PLW0108
    assert verb_for(Left(), rules) is Verb.RETRY
    assert "returned a coroutine" in caplog.text


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_predicate_that_raises_an_exit_does_not_match_and_is_logged(raised, caplog):
    def exits(error):
        raise raised

    assert verb_for(Left(), actor_rules(discard_on=when(Left, exits))) is None
    assert "the rule does not match" in caplog.text


def test_predicates_on_one_class_are_tried_in_the_order_of_their_declaration_and_no_further_than_needed():
    tried = []

    def trying(name, held):
        def predicate(error):
            tried.append(name)
            return held

        return when(Left, predicate)

    rules = actor_rules(
        discard_on=[trying("third", True), trying("fourth", True)],
        retry_on={trying("first", False): 3, trying("second", False): 4},
    )
    assert verb_for(Left(), rules) is Verb.DISCARD
    assert tried == ["first", "second", "third"]


def test_the_rules_tried_for_a_class_are_in_order_and_end_with_a_bare_class():
    own = actor_rules(retry_on=Base, discard_on=when(Left, lambda e: False), alert_on=Exception)
    tried = RuleSet(own, broker_rules(retry_on=when(Left, lambda e: False))).tried(Both)
    assert [(rule.owner, rule.verb, rule.target) for rule in tried] == [
        ("actor", Verb.DISCARD, Left),
        ("broker", Verb.RETRY, Left),
        ("actor", Verb.RETRY, Base),
    ]


def test_the_order_for_a_class_is_worked_out_once():
    rules = RuleSet(actor_rules(discard_on=Base))
    left = rules.tried(Left)
    assert rules.tried(Right) == left
    assert rules.tried(Left) is left


def test_generated_classes_do_not_accumulate():
    rules = RuleSet(actor_rules(discard_on=Left))
    for number in range(2_500):
        assert rules.match(type(f"Left{number}", (Left,), {})()).verb is Verb.DISCARD
    assert len(rules._plans) <= 1_000


def test_rules_that_never_decide_are_known():
    narrow = when(Left, lambda e: True)
    own = actor_rules(retry_on=(narrow, Left), discard_on=(narrow, when(Right, lambda e: False)))
    broker = broker_rules(alert_on=(Left, when(Left, lambda e: True), Right, Base), discard_on="builtins.OSError")
    lost = RuleSet(own, broker).unreachable()
    assert [(rule.owner, rule.verb, rule.target) for rule in lost] == [
        ("actor", Verb.DISCARD, Left),
        ("broker", Verb.ALERT, Left),
        ("broker", Verb.ALERT, Left),
    ]


def test_an_exception_rule_does_not_catch_a_base_exception():
    assert verb_for(KeyboardInterrupt(), actor_rules(retry_on=Exception)) is None


@given(
    error=st.sampled_from(CLASSES),
    own=st.dictionaries(st.sampled_from(CLASSES), st.sampled_from(["retry_on", "discard_on", "alert_on"])),
    broker=st.dictionaries(st.sampled_from(CLASSES), st.sampled_from(["retry_on", "discard_on", "alert_on"])),
    narrowed=st.dictionaries(
        st.tuples(st.sampled_from(CLASSES), st.booleans(), st.booleans()),
        st.sampled_from(["retry_on", "discard_on", "alert_on"]),
    ),
)
def test_the_match_nearest_in_the_mro_wins_as_a_search_by_hand_finds_it(error, own, broker, narrowed):
    def declared(bare, of_broker):
        options = {"retry_on": [], "discard_on": [], "alert_on": []}
        for cls, option in bare.items():
            options[option].append(cls)
        for (cls, broad, admits), option in narrowed.items():
            if broad is of_broker:
                options[option].append(when(cls, (lambda e: True) if admits else (lambda e: False)))
        return options

    def by_hand():
        for base in error.__mro__:
            for of_broker, bare in ((False, own), (True, broker)):
                if (base, of_broker, True) in narrowed:
                    return narrowed[base, of_broker, True]
                if base in bare:
                    return bare[base]
        return None

    rules = RuleSet(actor_rules(**declared(own, False)), broker_rules(**declared(broker, True)))
    found = rules.match(error())
    assert (None if found is None else f"{found.verb.value}_on") == by_hand()
    assert rules.match(error()) is found


# Groups.


def group(*errors):
    return Group("several", errors)


def test_a_group_alerts_if_any_leaf_alerts_else_discards_if_any_discards():
    rules = actor_rules(retry_on=OSError, discard_on=ValueError, alert_on=KeyError)
    assert verb_for(group(OSError(), group(ValueError(), group(KeyError()))), rules) is Verb.ALERT
    assert verb_for(group(OSError(), group(ValueError())), rules) is Verb.DISCARD
    assert verb_for(group(OSError(), TypeError()), rules) is Verb.RETRY
    assert verb_for(group(TypeError()), rules) is None


def test_a_group_is_retried_by_the_leaf_that_allows_the_fewest_attempts():
    rules = RuleSet(actor_rules(retry_on={OSError: 5, ValueError: 2, KeyError: 9}))
    rule, leaf = rules.match_leaf(group(OSError(), ValueError(), KeyError()))
    assert rule.policy.attempts == 2
    assert type(leaf) is ValueError


def test_the_first_of_equal_leaves_decides():
    rules = RuleSet(actor_rules(retry_on={OSError: 3, ValueError: 3}, discard_on=(KeyError, TypeError)))
    assert type(rules.match_leaf(group(group(ValueError()), OSError()))[1]) is ValueError
    assert type(rules.match_leaf(group(OSError(), TypeError(), KeyError()))[1]) is TypeError


def test_a_group_may_be_nested_deeper_than_the_stack():
    error = OSError()
    for _ in range(3_000):
        error = group(error)
    assert verb_for(error, actor_rules(alert_on=OSError)) is Verb.ALERT


def test_a_rule_for_the_group_itself_counts_where_no_leaf_is_named():
    rules = actor_rules(retry_on=Group, discard_on=ValueError)
    assert verb_for(group(OSError()), rules) is Verb.RETRY
    assert verb_for(group(ValueError()), rules) is Verb.DISCARD


def test_the_highest_number_of_attempts_is_known():
    assert RuleSet(actor_rules(retry_on={Left: 3, Right: 8})).max_attempts == 8
    assert RuleSet(actor_rules(discard_on=Left)).max_attempts == 0

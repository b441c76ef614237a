from lilliput.compress.context import Context
from lilliput.data.corpus import Corpus


def test_reads_the_corpus_once_and_only_on_access(facts, tmp_path):
    reads = []
    context = Context(tmp_path, "", lambda: reads.append(1) or Corpus(facts, facts, facts))
    assert not reads
    assert context.held_out == [question for question in facts if question.answerable]
    assert context.corpus.train is facts
    assert len(reads) == 1


def test_a_context_for_one_training_has_its_questions_and_checkpoints(facts, tmp_path):
    context = Context(tmp_path, "", lambda: Corpus(facts, facts, facts), checkpoints=tmp_path / "state")
    part = context.for_training("branch-1", facts[:2])
    assert part.corpus == Corpus(facts[:2], facts, facts)
    assert part.checkpoints == tmp_path / "state" / "branch-1"
    assert Context(tmp_path, "", lambda: Corpus(facts, facts, facts)).for_training("x", facts).checkpoints is None

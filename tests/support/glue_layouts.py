"""What the files of the GLUE download look like."""

# First lines of each file as GLUE distributes it.
LAYOUTS = {
    "cola": ["gj04\t1\t\tOur friends won't buy \"this.", "gj04\t0\t*\tThe box fell"],
    "sst2": ["sentence\tlabel", "hide new secretions \t0", "a gorgeous film \t1"],
    "mrpc": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
             '1\t1\t2\tHe said " yes .\tHe agreed .', "0\t3\t4\tA .\tB ."],
    "stsb": ["index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
             "0\tm\tf\t2012\t1\tn\tn\tA plane.\tAn air plane.\t5.000", "1\tm\tf\t2012\t1\tn\tn\tA man.\tA cat.\t0.25"],
    "qqp": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "1\t1\t2\tHow?\tWhy?\t0", "2\t3\t4\tWho?\tWho is?\t1"],
    "mnli": ["index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
             "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
             "0\t1\t1n\tg\tp\tp\tp\tp\tIt rains.\tIt is wet.\tneutral\tneutral",
             "1\t1\t1c\tg\tp\tp\tp\tp\tIt rains.\tIt is dry.\tneutral\tcontradiction"],
    "qnli": ["index\tquestion\tsentence\tlabel", "0\tWhat?\tThis.\tentailment", "1\tWho?\tThat.\tnot_entailment"],
    "rte": ["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tnot_entailment", "1\tC.\tD.\tentailment"],
    "wnli": ["index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1", "1\tC.\tD.\t0"],
}  # fmt: skip

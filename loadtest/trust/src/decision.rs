//! How results and referees' reports become a decision: sections 7 and 8 of the protocol, on outputs that are only right
//! or wrong.

/// An answer: the model's, or one of the others. Equal ones agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    Right,
    Wrong(u32),
}

/// What is needed next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// So many more referees.
    Referees(usize),
    /// Two more replicas, or the end.
    Nodes,
    Verified(Output),
}

/// Who was asked, and what each said about each output.
#[derive(Debug, Default)]
pub struct Referees {
    asked: Vec<usize>,
    pub reports: Vec<(usize, Output, bool)>,
}

/// Referees that decide together.
const PANEL: usize = 3;

impl Referees {
    pub fn ask(&mut self, at: usize) {
        self.asked.push(at);
    }

    pub fn hear(&mut self, at: usize, output: Output, confirms: bool) {
        self.reports.push((at, output, confirms));
    }

    /// What the asked have not said yet.
    pub fn open(&self, results: &[(usize, Output)]) -> Vec<(usize, Output)> {
        let mut outputs: Vec<Output> = Vec::new();
        for (_, output) in results {
            if !outputs.contains(output) {
                outputs.push(*output);
            }
        }
        let said = |at: usize, output: Output| self.reports.iter().any(|r| r.0 == at && r.1 == output);
        let all = self.asked.iter().flat_map(|at| outputs.iter().map(move |output| (*at, *output)));
        all.filter(|(at, output)| !said(*at, *output)).collect()
    }

    fn votes(&self, output: Output) -> (usize, usize) {
        let of = |confirms| self.reports.iter().filter(|r| r.1 == output && r.2 == confirms).count();
        (of(true), of(false))
    }

    /// One referee's no asks for two more; two of three decide.
    pub fn rejected(&self, output: Output) -> bool {
        let (_, no) = self.votes(output);
        2 * no > PANEL
    }

    fn doubted(&self, output: Output) -> bool {
        self.votes(output).1 > 0
    }

    /// Who said of an output what two others denied.
    pub fn overruled(&self) -> Vec<usize> {
        let wrong = |r: &&(usize, Output, bool)| {
            let (yes, no) = self.votes(r.1);
            if r.2 { 2 * no > PANEL } else { 2 * yes > PANEL }
        };
        let mut found: Vec<usize> = self.reports.iter().filter(wrong).map(|r| r.0).collect();
        found.sort_unstable();
        found.dedup();
        found
    }
}

/// What follows from the results so far. `audited`: referees look although all results are equal.
pub fn settle(results: &[(usize, Output)], with_referees: bool, audited: bool, referees: &Referees) -> Round {
    let quorum = results.len() / 2 + 1;
    let size = |output: Output| results.iter().filter(|r| r.1 == output).count();
    let unequal = results.iter().any(|r| r.1 != results[0].1);
    if with_referees && (unequal || audited) {
        if referees.asked.is_empty() {
            return Round::Referees(1);
        }
        let doubt = results.iter().any(|r| referees.doubted(r.1));
        if doubt && referees.asked.len() < PANEL {
            return Round::Referees(PANEL - referees.asked.len());
        }
    }
    let passes = |output: Output| size(output) >= quorum && !referees.rejected(output);
    match results.iter().map(|r| r.1).find(|output| passes(*output)) {
        Some(output) => Round::Verified(output),
        None => Round::Nodes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Output::{Right, Wrong};

    fn panel(words: &[(usize, Output, bool)]) -> Referees {
        let mut referees = Referees::default();
        for (at, output, confirms) in words {
            if !referees.asked.contains(at) {
                referees.ask(*at);
            }
            referees.hear(*at, *output, *confirms);
        }
        referees
    }

    #[test]
    fn equal_results_are_verified_and_unequal_ones_are_looked_at() {
        let equal = [(0, Right), (1, Right), (2, Right)];
        let none = Referees::default();
        assert_eq!(settle(&equal, true, false, &none), Round::Verified(Right));
        assert_eq!(settle(&equal, true, true, &none), Round::Referees(1));
        let unequal = [(0, Right), (1, Wrong(0)), (2, Wrong(0))];
        assert_eq!(settle(&unequal, false, true, &none), Round::Verified(Wrong(0)));
        assert_eq!(settle(&unequal, true, false, &none), Round::Referees(1));
        let doubt = panel(&[(7, Right, true), (7, Wrong(0), false)]);
        assert_eq!(settle(&unequal, true, false, &doubt), Round::Referees(2));
    }

    #[test]
    fn two_of_three_referees_decide_over_a_majority_too() {
        let unequal = [(0, Right), (1, Wrong(0)), (2, Wrong(0))];
        let say = |at, honest: bool| [(at, Right, honest), (at, Wrong(0), !honest)];
        let two = panel(&[say(7, true), say(8, false), say(9, true)].concat());
        assert_eq!(settle(&unequal, true, false, &two), Round::Nodes);
        assert_eq!(two.overruled(), [8]);
        let more = [(0, Right), (1, Wrong(0)), (2, Wrong(0)), (3, Right), (4, Right)];
        assert_eq!(settle(&more, true, false, &two), Round::Verified(Right));
        let lost = panel(&[say(7, true), say(8, false), say(9, false)].concat());
        assert_eq!(settle(&unequal, true, false, &lost), Round::Verified(Wrong(0)));
        assert_eq!((lost.overruled(), lost.rejected(Right)), (vec![7], true));
    }
}

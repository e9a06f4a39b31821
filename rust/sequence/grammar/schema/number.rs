//! Ranges of numbers as regular expressions over their decimal digits.

use llguidance::derivre::RegexAst;
use serde_json::Number;

use super::text::times;

/// Digits of an integer at most, where no bound asks for more.
const DIGITS: usize = 15;
/// Digits of an integer at most.
const MOST_DIGITS: usize = 18;
/// Digits of a multiple at most: their number multiplies the states.
const MULTIPLE_DIGITS: usize = 9;
/// The greatest divisor.
const MOST_DIVISOR: u64 = 1000;

/// What a number has to fulfil.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NumberRule {
    /// Whether it has no fraction.
    pub integer: bool,
    /// The greatest lower bound, and whether it is excluded.
    pub least: Option<(Number, bool)>,
    /// The least upper bound, and whether it is excluded.
    pub most: Option<(Number, bool)>,
    /// What it is a multiple of.
    pub multiples: Vec<Number>,
}

impl NumberRule {
    /// Takes a further lower bound.
    pub fn at_least(&mut self, bound: &Number, excluded: bool) {
        let tighter = |(old, was): &(Number, bool)| match compare(bound, old) {
            std::cmp::Ordering::Greater => true,
            std::cmp::Ordering::Equal => excluded && !was,
            std::cmp::Ordering::Less => false,
        };
        if self.least.as_ref().is_none_or(tighter) {
            self.least = Some((bound.clone(), excluded));
        }
    }

    /// Takes a further upper bound.
    pub fn at_most(&mut self, bound: &Number, excluded: bool) {
        let tighter = |(old, was): &(Number, bool)| match compare(bound, old) {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Equal => excluded && !was,
            std::cmp::Ordering::Greater => false,
        };
        if self.most.as_ref().is_none_or(tighter) {
            self.most = Some((bound.clone(), excluded));
        }
    }

    /// Whether a number fulfils it.
    pub fn admits(&self, number: &Number) -> bool {
        let whole = Decimal::new(number).is_integer();
        let above = self.least.as_ref().is_none_or(|(bound, excluded)| match compare(number, bound) {
            std::cmp::Ordering::Greater => true,
            std::cmp::Ordering::Equal => !excluded,
            std::cmp::Ordering::Less => false,
        });
        let below = self.most.as_ref().is_none_or(|(bound, excluded)| match compare(number, bound) {
            std::cmp::Ordering::Less => true,
            std::cmp::Ordering::Equal => !excluded,
            std::cmp::Ordering::Greater => false,
        });
        (whole || !self.integer) && above && below && self.multiples.iter().all(|of| is_multiple(number, of))
    }

    /// Whether it has a bound.
    fn is_bounded(&self) -> bool {
        self.least.is_some() || self.most.is_some()
    }

    /// What fulfils both, multiples left aside.
    pub fn and(&self, other: &Self) -> Self {
        let mut both = Self { integer: self.integer || other.integer, multiples: Vec::new(), ..self.clone() };
        if let Some((bound, excluded)) = &other.least {
            both.at_least(bound, *excluded);
        }
        if let Some((bound, excluded)) = &other.most {
            both.at_most(bound, *excluded);
        }
        both
    }

    /// Whether nothing is between the bounds, however many digits it has.
    pub fn is_empty(&self) -> bool {
        let Some(((least, above), (most, below))) = self.least.as_ref().zip(self.most.as_ref()) else { return false };
        match compare(least, most) {
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => *above || *below,
            std::cmp::Ordering::Greater => true,
        }
    }

    /// Whether a bound has as many digits as numbers are written with: then some between the bounds may have more.
    pub fn is_fine(&self) -> bool {
        let usual = self.usual_digits();
        self.least.iter().chain(&self.most).any(|(bound, _)| digits(bound) >= usual)
    }

    /// The numbers as text.
    pub fn regex(&self) -> RegexAst {
        if !self.integer && !self.is_bounded() && self.multiples.is_empty() {
            return RegexAst::Regex(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?".into());
        }
        let shape = self.shape();
        let mut alternatives = Vec::new();
        if let Some(magnitude) = self.magnitude(false) {
            alternatives.push(RegexAst::And([vec![shape.clone()], magnitude].concat()));
        }
        if let Some(magnitude) = self.magnitude(true) {
            let inside = RegexAst::And([vec![shape], magnitude].concat());
            alternatives.push(RegexAst::Concat(vec![RegexAst::Byte(b'-'), inside]));
        }
        RegexAst::Or(alternatives)
    }

    /// Digits and a point without a sign.
    fn shape(&self) -> RegexAst {
        let digits = self.digits();
        let mut all = self.multiples.iter().map(multiple).collect::<Vec<_>>();
        all.push(if self.takes_fractions() {
            RegexAst::And(vec![
                RegexAst::Regex(r"(0|[1-9][0-9]*)(\.[0-9]+)?".into()),
                times(RegexAst::Regex("[0-9.]".into()), 1, Some(digits as u32 + 1)),
            ])
        } else {
            RegexAst::Regex(format!("0|[1-9][0-9]{{0,{}}}", digits - 1))
        });
        RegexAst::And(all)
    }

    /// A multiple of an integer is written as one.
    fn takes_fractions(&self) -> bool {
        !self.integer && !self.multiples.iter().any(|of| Decimal::new(of).is_integer())
    }

    /// Digits of the numbers at most.
    pub fn digits(&self) -> usize {
        let bounds = self.least.iter().chain(&self.most);
        let asked = bounds.map(|(bound, _)| Decimal::new(bound).digits_beyond()).max().unwrap_or(0);
        let most = if self.takes_fractions() { DIGITS } else { MOST_DIGITS };
        asked.clamp(self.usual_digits(), most)
    }

    fn usual_digits(&self) -> usize {
        if self.multiples.is_empty() { DIGITS } else { MULTIPLE_DIGITS }
    }

    /// What the digits of the numbers with that sign fulfil; none if there are no such numbers.
    fn magnitude(&self, negative: bool) -> Option<Vec<RegexAst>> {
        let (low, high) = if negative { (&self.most, &self.least) } else { (&self.least, &self.most) };
        let mut all = Vec::new();
        if let Some((bound, excluded)) = low {
            let decimal = Decimal::new(bound);
            if decimal.is_zero() && *excluded || !decimal.is_zero() && decimal.negative == negative {
                all.push(decimal.reached(*excluded));
            }
        }
        if let Some((bound, excluded)) = high {
            let decimal = Decimal::new(bound);
            if !decimal.is_zero() && decimal.negative != negative {
                return None;
            }
            all.push(RegexAst::Not(Box::new(decimal.reached(!excluded))));
        }
        // An integer has no negative zero.
        if negative && !self.takes_fractions() {
            all.push(RegexAst::Not(Box::new(RegexAst::Byte(b'0'))));
        }
        Some(all)
    }
}

/// The digits of a number before and after the point.
pub fn digits(number: &Number) -> usize {
    let decimal = Decimal::new(number);
    decimal.whole.len() + decimal.fraction.len()
}

/// Says why multiples of a number cannot be told, if they cannot.
pub fn refuses_multiples_of(number: &Number) -> Option<String> {
    let decimal = Decimal::new(number);
    let Some((value, scale)) = decimal.scaled() else {
        return Some(format!("multipleOf {number} has too many digits"));
    };
    if decimal.negative || value == 0 {
        return Some(format!("multipleOf {number} must be greater than 0"));
    }
    if value > MOST_DIVISOR {
        return Some(format!(
            "multipleOf {number} has more than {MOST_DIVISOR} steps; use a divisor up to {MOST_DIVISOR}"
        ));
    }
    // Only halves of halves have exact quotients in binary.
    let exact = (u128::from(value) << scale) % 10u128.pow(scale) == 0;
    (!exact).then(|| {
        format!(
            "multipleOf {number} cannot be told in binary floating point; use an integer or a sum of halves (0.5, 0.25)"
        )
    })
}

fn multiple(of: &Number) -> RegexAst {
    let (value, scale) = Decimal::new(of).scaled().unwrap_or((1, 0));
    RegexAst::MultipleOf(value as u32, scale)
}

fn is_multiple(number: &Number, of: &Number) -> bool {
    match (number.as_i128(), of.as_i128()) {
        (Some(number), Some(of)) => number % of == 0,
        _ => number.as_f64().zip(of.as_f64()).is_some_and(|(number, of)| (number / of).fract() == 0.0),
    }
}

/// The order of two numbers.
fn compare(one: &Number, other: &Number) -> std::cmp::Ordering {
    match (one.as_i128(), other.as_i128()) {
        (Some(one), Some(other)) => one.cmp(&other),
        _ => one.as_f64().partial_cmp(&other.as_f64()).unwrap_or(std::cmp::Ordering::Equal),
    }
}

/// Whether two numbers are equal, as JSON Schema compares them: 1 is 1.0.
pub fn equal(one: &Number, other: &Number) -> bool {
    compare(one, other) == std::cmp::Ordering::Equal
}

/// A number's decimal digits.
#[derive(Debug)]
struct Decimal {
    negative: bool,
    /// Digits before the point, without leading zeros but for a single one.
    whole: String,
    /// Digits after the point, without trailing zeros.
    fraction: String,
}

impl Decimal {
    fn new(number: &Number) -> Self {
        let text = number.to_string();
        let (negative, text) = text.strip_prefix('-').map_or((false, text.as_str()), |rest| (true, rest));
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let digits = format!("{whole}{fraction}");
        Self::placed(negative, &digits, whole.len() as i64 + exponent.parse::<i64>().unwrap_or(0))
    }

    /// The digits with the point after the first `point`.
    fn placed(negative: bool, digits: &str, point: i64) -> Self {
        let zeros = |count: i64| "0".repeat(count.max(0) as usize);
        let padded = format!("{}{digits}{}", zeros(-point), zeros(point - digits.len() as i64));
        let (whole, fraction) = padded.split_at(point.max(0) as usize);
        let whole = whole.trim_start_matches('0');
        Self {
            negative,
            whole: if whole.is_empty() { "0".into() } else { whole.into() },
            fraction: fraction.trim_end_matches('0').into(),
        }
    }

    /// Digits before the point of the numbers next to it.
    fn digits_beyond(&self) -> usize {
        self.whole.len() + usize::from(self.whole.bytes().all(|digit| digit == b'9'))
    }

    fn is_integer(&self) -> bool {
        self.fraction.is_empty()
    }

    fn is_zero(&self) -> bool {
        self.whole == "0" && self.fraction.is_empty()
    }

    /// The number as an integer times a negative power of ten.
    fn scaled(&self) -> Option<(u64, u32)> {
        let value = format!("{}{}", self.whole, self.fraction).parse().ok()?;
        (self.fraction.len() <= 9).then_some((value, self.fraction.len() as u32))
    }

    /// Plain decimals whose magnitude is at least this one's (more, if excluded).
    fn reached(&self, excluded: bool) -> RegexAst {
        let whole = self.whole.as_bytes();
        let mut alternatives = vec![format!(r"[1-9][0-9]{{{},}}(\.[0-9]+)?", whole.len())];
        for (at, &digit) in whole.iter().enumerate().filter(|(_, digit)| **digit < b'9') {
            let more = char::from(digit + 1);
            let left = whole.len() - at - 1;
            alternatives.push(format!(r"{}[{more}-9][0-9]{{{left}}}(\.[0-9]+)?", &self.whole[..at]));
        }
        alternatives.extend(self.reached_after_point(excluded).into_iter().map(|tail| format!("{}{tail}", self.whole)));
        RegexAst::Regex(alternatives.join("|"))
    }

    /// What may follow the same digits before the point.
    fn reached_after_point(&self, excluded: bool) -> Vec<String> {
        let fraction = self.fraction.as_bytes();
        let mut tails: Vec<String> = (0..fraction.len())
            .filter(|&at| fraction[at] < b'9')
            .map(|at| format!(r"\.{}[{}-9][0-9]*", &self.fraction[..at], char::from(fraction[at] + 1)))
            .collect();
        tails.push(match (excluded, self.fraction.as_str()) {
            (true, same) => format!(r"\.{same}[0-9]*[1-9][0-9]*"),
            (false, "") => r"(\.[0-9]+)?".into(),
            (false, same) => format!(r"\.{same}[0-9]*"),
        });
        tails
    }
}

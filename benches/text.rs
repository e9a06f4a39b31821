//! What the text stage costs per token: `cargo bench --bench text`.

use std::hint::black_box;

use _core::sequence::text::{Batching, TextOptions, TextStream};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

const PASSAGE: &str = "Once upon a time, in a small village by the sea, there lived a café owner \
    who counted her coins (€ 12, then € 13) and looked at the waves. \n";
const TOKENS: usize = 1000;

/// Pieces as a tokenizer makes them: a word with the space before it.
fn pieces() -> Vec<&'static [u8]> {
    let words = PASSAGE.split_inclusive(' ').map(str::as_bytes);
    words.cycle().take(TOKENS).collect()
}

fn stops() -> TextOptions {
    let strings = ["</s>", "\nUser:", "<|im_end|>", "time to go"];
    TextOptions { stop_strings: strings.map(String::from).to_vec(), ..TextOptions::default() }
}

fn batching() -> TextOptions {
    TextOptions { batching: Some(Batching { tokens: 10, interval: 0.12 }), ..TextOptions::default() }
}

/// One generation: all pieces, 10 ms apart.
fn generate(options: TextOptions, pieces: &[&[u8]], out: &mut String) {
    let mut stream = TextStream::new(options);
    for (index, piece) in pieces.iter().enumerate() {
        let found = stream.push(0, black_box(piece), index as f64 * 0.01, out);
        assert!(found.is_none(), "the passage contains no stop");
    }
    assert!(stream.finish(out).is_none(), "no stop was waiting");
}

fn push(criterion: &mut Criterion) {
    let pieces = pieces();
    let mut out = String::with_capacity(PASSAGE.len() * TOKENS);
    let mut group = criterion.benchmark_group("text/push");
    group.throughput(Throughput::Elements(TOKENS as u64));
    let cases = [("plain", TextOptions::default()), ("four_stops", stops()), ("batching", batching())];
    for (name, options) in cases {
        group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
            bencher.iter(|| {
                out.clear();
                generate(options.clone(), &pieces, &mut out);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, push);
criterion_main!(benches);

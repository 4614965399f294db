//! The one binary: a coordinator, and what operators look and act with.
//!
//! Data goes to standard output, talk to standard error. The exit code says what kind of failure it was (see `failure`).

#![forbid(unsafe_code)]

mod act;
mod args;
mod bench;
mod certs;
mod client;
mod clock;
mod demo;
mod descriptors;
mod failure;
mod look;
mod print;
mod processes;
mod relay;
mod serve;
mod token;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Args, Command};
use failure::Failure;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(why) => return failure::usage(&why),
    };
    let done = run(args).and_then(|()| match print::failure() {
        None => Ok(()),
        Some(why) => Err(failure::output(why)),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run(args: Args) -> Result<(), Failure> {
    match args.command {
        Command::Serve(serve) => serve::serve(&serve),
        Command::Relay(args) => relay::relay(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Bench(bench) => bench::bench(bench),
        Command::Status(status) => look::status(&status),
        Command::Coordinators(args) => look::coordinators(&args),
        Command::Watch(watch) => look::watch(&watch),
        Command::History(history) => look::history(&history),
        Command::Checkpoints(checkpoints) => look::checkpoints(&checkpoints),
        Command::Drain(member) => act::drain(&member),
        Command::Undrain(member) => act::undrain(&member),
        Command::Evict(member) => act::evict(&member),
        Command::Notice(notice) => act::notice(&notice),
        Command::Resize(resize) => act::resize(&resize),
        Command::Save(job) => act::save(&job),
        Command::Close(job) => act::close(&job),
        Command::Forget(job) => act::forget(&job),
        Command::Certs(certs) => certs::certs(&certs),
        Command::Token(token) => token::token(&token),
        Command::Completions(shell) => {
            let mut command = Args::command();
            let mut script = Vec::new();
            clap_complete::generate(shell.shell, &mut command, "reknit", &mut script);
            print::data(format_args!("{}", String::from_utf8_lossy(&script).trim_end()));
            Ok(())
        }
    }
}
